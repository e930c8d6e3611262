//! A ring between two threads. A thread sleeps only after `final_check` has found nothing, so that no
//! wake-up is lost: `park` and `unpark` stand for an event channel.
//!
//! ```console
//! $ cargo run -p pvio-ring --example threads
//! ```

use pvio_ring::shm::HeapMemory;
use pvio_ring::{BackRing, FrontRing};
use std::thread::{self, Thread};

type Fallible<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> Fallible<()> {
    let page = HeapMemory::pages(1);
    let mut front = FrontRing::init(page.clone(), 8)?;
    let frontend = thread::current();
    let backend = thread::spawn(move || double(page, &frontend));

    let (mut numbers, mut sum) = (1..=100_000_u64, 0);
    while sum < 100_000 * 100_001 {
        for number in numbers.by_ref().take(front.free() as usize) {
            front.push(&number.to_le_bytes())?;
        }
        if front.publish() {
            backend.thread().unpark();
        }
        if !front.final_check()? {
            thread::park();
        }
        while let Some(mut response) = front.pop()? {
            let mut bytes = [0; 8];
            response.read(&mut bytes)?;
            sum += u64::from_le_bytes(bytes);
        }
    }
    backend.join().expect("the backend does not panic")
}

/// Responds to each request with twice its number, until that of the last one.
fn double(page: HeapMemory, frontend: &Thread) -> Fallible<()> {
    let (mut ring, mut number) = (BackRing::attach(page, 8)?, 0);
    while number < 100_000 {
        if !ring.final_check()? {
            thread::park();
        }
        while let Some(mut request) = ring.pop()? {
            // A slot is read once: the peer can change it at any time.
            let mut bytes = [0; 8];
            request.read(&mut bytes)?;
            number = u64::from_le_bytes(bytes);
            ring.push(&(2 * number).to_le_bytes())?;
        }
        if ring.publish() {
            frontend.unpark();
        }
    }
    Ok(())
}
