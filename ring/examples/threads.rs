//! A ring between two threads. A thread sleeps only after `final_check` has found nothing, so that no
//! wake-up is lost: `park` and `unpark` stand for an event channel.
//!
//! ```console
//! $ cargo run -p pvio-ring --example threads
//! ```

use pvio_ring::shm::HeapMemory;
use pvio_ring::{BackRing, FrontRing};
use std::error::Error;
use std::thread::{self, Thread};

type Fallible<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Bytes of a slot.
const SLOT: usize = 8;
const REQUESTS: u64 = 100_000;

fn main() -> Fallible<()> {
    let page = HeapMemory::pages(1);
    let front = FrontRing::init(page.clone(), SLOT)?;
    let back = BackRing::attach(page, SLOT)?;
    let frontend = thread::current();
    let backend = thread::spawn(move || serve(back, &frontend));
    let sum = request(front, backend.thread())?;
    backend.join().expect("the backend does not panic")?;
    // The backend doubles: 2 * (0 + 1 + … + (n - 1)).
    assert_eq!(sum, REQUESTS * (REQUESTS - 1));
    Ok(())
}

/// Sends every number and returns the sum of the responses.
fn request(mut ring: FrontRing<HeapMemory>, backend: &Thread) -> Fallible<u64> {
    let (mut sent, mut received, mut sum) = (0, 0, 0_u64);
    loop {
        while let Some(mut response) = ring.pop()? {
            let mut bytes = [0; SLOT];
            response.read(&mut bytes)?;
            sum += u64::from_le_bytes(bytes);
            received += 1;
        }
        while sent < REQUESTS && ring.free() > 0 {
            ring.push(&sent.to_le_bytes())?;
            sent += 1;
        }
        if ring.publish() {
            backend.unpark();
        }
        if received == REQUESTS {
            break;
        }
        // Requests are in flight here, so that a response will come.
        if !ring.final_check()? {
            thread::park();
        }
    }
    Ok(sum)
}

/// Responds to each request with twice its number.
fn serve(mut ring: BackRing<HeapMemory>, frontend: &Thread) -> Fallible<()> {
    let mut served = 0;
    while served < REQUESTS {
        while let Some(mut request) = ring.pop()? {
            // A slot is read once: the peer can change it at any time.
            let mut bytes = [0; SLOT];
            request.read(&mut bytes)?;
            ring.push(&(2 * u64::from_le_bytes(bytes)).to_le_bytes())?;
            served += 1;
        }
        if ring.publish() {
            frontend.unpark();
        }
        if served < REQUESTS && !ring.final_check()? {
            thread::park();
        }
    }
    Ok(())
}
