//! What a disk was asked for, written down so that `fio --read_iolog` can ask for it again.
//!
//! fio's version 3 of the format (fio 3.31 and later): a line for each operation as it begins, in
//! microseconds since the trace began. What was asked for by several queues is in one trace.

use super::clock::Clock;
use super::uring::Watch;
use super::wait::WaitEngine;
use super::{BlockEngine, Done, Full, Geometry, Io, Segments};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use pvio_ring::shm::PoolMemory;
use std::io::{self, BufWriter, Write};
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Where a disk's trace goes; for all its queues.
pub struct Trace {
    out: Mutex<Out>,
    name: String,
}

struct Out {
    write: BufWriter<Box<dyn Write + Send>>,
    begin: Duration,
    /// What it could not be written for; told once.
    failed: bool,
}

impl Trace {
    /// A trace that begins now. `name` is the file or device that a replay is to use, an absolute
    /// path without blanks.
    ///
    /// # Errors
    /// What writing says.
    pub fn new(
        out: Box<dyn Write + Send>,
        name: impl Into<String>,
        clock: &impl Clock,
    ) -> io::Result<Self> {
        let name = name.into();
        let mut write = BufWriter::new(out);
        write!(write, "fio version 3 iolog\n0 {name} add\n0 {name} open\n")?;
        let out = Out { write, begin: clock.now(), failed: false };
        Ok(Self { out: Mutex::new(out), name })
    }

    fn log(&self, now: Duration, io: Io, bytes: usize) {
        let (what, sector, len) = match io {
            Io::Read { sector } => ("read", sector, bytes as u64),
            Io::Write { sector } => ("write", sector, bytes as u64),
            Io::Flush => ("datasync", 0, 0),
            Io::Discard { sector, sectors, .. } => ("trim", sector, sectors.wrapping_mul(512)),
            // fio has no word for it.
            Io::WriteZeroes { sector, sectors } => ("write", sector, sectors.wrapping_mul(512)),
        };
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        let at = now.saturating_sub(out.begin).as_micros();
        let (name, from) = (&self.name, sector.wrapping_mul(512));
        let written = writeln!(out.write, "{at} {name} {what} {from} {len}");
        if let Err(error) = written
            && !core::mem::replace(&mut out.failed, true)
        {
            tracing::warn!(%error, "a disk's trace has gaps");
        }
    }

    /// Brings what was written down out.
    ///
    /// # Errors
    /// What writing says.
    pub fn flush(&self) -> io::Result<()> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner).write.flush()
    }
}

/// What is buffered is written.
impl Drop for Trace {
    fn drop(&mut self) {
        let out = self.out.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = out.write.flush();
    }
}

/// An engine whose operations are written down.
pub struct Traced<E, C> {
    engine: E,
    trace: Arc<Trace>,
    clock: C,
}

impl<E, C> Traced<E, C> {
    /// The engine, with a trace. All engines that share a trace must share the clock.
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

    fn reap(&mut self, done: &mut Done<'_, B>) {
        self.engine.reap(done);
    }
}

impl<B, E: WaitEngine<B>, C: Clock> WaitEngine<B> for Traced<E, C> {
    fn watch(&mut self, file: OwnedFd) -> Watch {
        self.engine.watch(file)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.engine.wait(timeout)
    }

    fn fired(&mut self, watch: Watch) -> bool {
        self.engine.fired(watch)
    }
}
