//! A custom storage engine: a read-only disk whose sectors contain their own numbers.
//!
//! ```console
//! $ cargo run -p pvio-storage --example own_engine
//! ```

use pvio_ring::IoSeg;
use pvio_ring::shm::{HeapMemory, Region, SharedMemory};
use pvio_storage::engine::wait::Waiting;
use pvio_storage::engine::{BlockEngine, Done, EngineError, Full, Geometry, Io, Segments};
use std::error::Error;

/// `completed` holds operations until they are reaped.
struct Numbers<B> {
    completed: Vec<(u32, Result<(), EngineError>, Segments<B>)>,
}

impl<B: SharedMemory> BlockEngine<B> for Numbers<B> {
    fn geometry(&self) -> Geometry {
        Geometry {
            sectors: 1 << 20,
            sector_size: 512,
            physical_sector_size: 512,
            read_only: true,
            discard: None,
            copied: false,
        }
    }

    fn submit(&mut self, tag: u32, io: Io, segments: &mut Segments<B>) -> Result<(), Full> {
        let result = match io {
            Io::Read { sector } => fill(sector, segments).ok_or(EngineError::Short),
            Io::Flush => Ok(()),
            _ => Err(EngineError::Unsupported),
        };
        // Buffers belong to the engine until their operation is reaped.
        self.completed.push((tag, result, std::mem::take(segments)));
        Ok(())
    }

    fn kick(&mut self) {}

    fn reap(&mut self, done: &mut Done<'_, B>) {
        for (tag, result, mut segments) in self.completed.drain(..) {
            done(tag, result, &mut segments);
        }
    }
}

/// Writes each sector's number to its first eight bytes, and zeroes to the others.
fn fill<B: SharedMemory>(mut sector: u64, segments: &Segments<B>) -> Option<()> {
    for segment in segments {
        for offset in (segment.offset..segment.offset + segment.len).step_by(512) {
            segment.buf.fill(offset, 512, 0)?;
            segment.buf.write_bytes(offset, &sector.to_le_bytes())?;
            sector += 1;
        }
    }
    Some(())
}

fn main() -> Result<(), Box<dyn Error>> {
    // A worker waits on its engine. `Waiting` adds an io_uring to wait on.
    let mut engine = Waiting::new(Numbers { completed: Vec::new() }, None)?;
    let page = HeapMemory::pages(1);
    let mut segments = vec![IoSeg { buf: page.clone(), offset: 0, len: 1024 }];
    engine.submit(7, Io::Read { sector: 5 }, &mut segments)?;
    engine.kick();
    let mut completed = Vec::new();
    engine.reap(&mut |tag, result, _| completed.push((tag, result)));
    assert_eq!(completed, [(7, Ok(()))]);
    let mut number = [0; 8];
    page.read_bytes(512, &mut number).ok_or("beyond the page")?;
    assert_eq!(u64::from_le_bytes(number), 6);
    Ok(())
}
