//! A trace of a disk's operations that `fio --read_iolog` can replay.
//!
//! Version 3 of fio's format (fio 3.31 and later): a line for each operation when it is submitted,
//! in microseconds since the start of the trace. The operations of all queues are in one trace.

use crate::engine::clock::Clock;
use crate::engine::{BlockEngine, Done, Full, Geometry, Io, Pauses, Segments};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use pvio_ring::shm::PoolMemory;
use pvio_runtime::{WaitPoint, Wrapper};
use std::io::{self, BufWriter, Write};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// The trace of a disk, shared by its queues.
pub struct Trace {
    out: Mutex<Out>,
    name: String,
}

struct Out {
    write: BufWriter<Box<dyn Write + Send>>,
    start: Duration,
    /// Whether writing has failed; logged once.
    failed: bool,
}

impl Trace {
    /// Starts a trace. `name` is the file or device for the replay, an absolute path without
    /// blanks.
    ///
    /// # Errors
    /// The error of writing.
    pub fn new(
        out: Box<dyn Write + Send>,
        name: impl Into<String>,
        clock: &impl Clock,
    ) -> io::Result<Self> {
        let name = name.into();
        let mut write = BufWriter::new(out);
        write!(write, "fio version 3 iolog\n0 {name} add\n0 {name} open\n")?;
        let out = Out { write, start: clock.now(), failed: false };
        Ok(Self { out: Mutex::new(out), name })
    }

    fn log(&self, now: Duration, io: Io, bytes: usize) {
        let (what, sector, len) = match io {
            Io::Read { sector } => ("read", sector, bytes as u64),
            Io::Write { sector } => ("write", sector, bytes as u64),
            Io::Flush => ("datasync", 0, 0),
            Io::Discard { sector, sectors, .. } => ("trim", sector, sectors.wrapping_mul(512)),
            // fio's format has no operation for it.
            Io::WriteZeroes { sector, sectors } => ("write", sector, sectors.wrapping_mul(512)),
        };
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        let at = now.saturating_sub(out.start).as_micros();
        let (name, from) = (&self.name, sector.wrapping_mul(512));
        let written = writeln!(out.write, "{at} {name} {what} {from} {len}");
        if let Err(error) = written
            && !core::mem::replace(&mut out.failed, true)
        {
            tracing::warn!(%error, "a trace cannot be written: it is incomplete");
        }
    }

    /// Writes buffered lines.
    ///
    /// # Errors
    /// The error of writing.
    pub fn flush(&self) -> io::Result<()> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner).write.flush()
    }
}

/// Writes buffered lines.
impl Drop for Trace {
    fn drop(&mut self) {
        let out = self.out.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = out.write.flush();
    }
}

/// An engine that traces its operations.
pub struct Traced<E, C> {
    engine: E,
    trace: Arc<Trace>,
    clock: C,
}

impl<E, C> Traced<E, C> {
    /// Wraps an engine. All engines that share a trace must share the clock.
    pub fn new(engine: E, trace: Arc<Trace>, clock: C) -> Self {
        Self { engine, trace, clock }
    }
}

impl<B, E: BlockEngine<B>, C: Clock> BlockEngine<B> for Traced<E, C> {
    fn geometry(&self) -> Geometry {
        self.engine.geometry()
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<B>) -> Result<(), Full> {
        let bytes = segments.iter().map(|s| s.len).sum();
        self.engine.submit(tag, io, segments)?;
        self.trace.log(self.clock.now(), io, bytes);
        Ok(())
    }

    fn register(&mut self, memory: PoolMemory) -> usize {
        self.engine.register(memory)
    }

    fn kick(&mut self) {
        self.engine.kick();
    }

    fn deadline(&self) -> Option<Duration> {
        self.engine.deadline()
    }

    fn pauses(&self) -> Pauses {
        self.engine.pauses()
    }

    fn reap(&mut self, done: &mut Done<'_, B>) {
        self.engine.reap(done);
    }
}

impl<E: WaitPoint, C> Wrapper for Traced<E, C> {
    type Inner = E;

    fn inner(&mut self) -> &mut E {
        &mut self.engine
    }
}
