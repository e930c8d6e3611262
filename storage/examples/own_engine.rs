//! A custom storage engine: a read-only disk whose sectors contain their own numbers.
//!
//! ```console
//! $ cargo run -p pvio-storage --example own_engine
//! ```

use pvio_ring::IoSeg;
use pvio_ring::shm::{HeapMemory, Region, SharedMemory};
use pvio_storage::engine::{BlockEngine, Done, EngineError, Full, Geometry, Io, Segments};
use std::sync::atomic::Ordering::Relaxed;

/// Operations that are carried out and not yet reaped.
struct Numbers<B>(Vec<(u32, Result<(), EngineError>, Segments<B>)>);

impl<B: SharedMemory> BlockEngine<B> for Numbers<B> {
    fn geometry(&self) -> Geometry {
        Geometry { read_only: true, ..Geometry::new(1 << 20) }
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<B>) -> Result<(), Full> {
        let result = match io {
            Io::Read { sector } => number(sector, segments).ok_or(EngineError::Short),
            _ => Err(EngineError::Unsupported),
        };
        // Buffers belong to the engine until their operation is reaped.
        self.0.push((tag, result, std::mem::take(segments)));
        Ok(())
    }

    fn kick(&mut self) {}

    fn reap(&mut self, done: &mut Done<'_, B>) {
        for (tag, result, mut segments) in self.0.drain(..) {
            done(tag, result, &mut segments);
        }
    }
}

fn number<B: SharedMemory>(mut sector: u64, segments: &Segments<B>) -> Option<()> {
    for segment in segments {
        for offset in (segment.offset..segment.offset + segment.len).step_by(512) {
            segment.buf.write_bytes(offset, &sector.to_le_bytes())?;
            sector += 1;
        }
    }
    Some(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (mut engine, page) = (Numbers(Vec::new()), HeapMemory::pages(1));
    let mut segments = vec![IoSeg { buf: page.clone(), offset: 0, len: 1024 }];
    engine.submit(7, Io::Read { sector: 5 }, &mut segments)?;
    engine.kick();
    engine.reap(&mut |tag, result, _| assert_eq!((tag, result), (7, Ok(()))));
    assert_eq!(page.load_u64(512, Relaxed), Some(6));
    Ok(())
}
