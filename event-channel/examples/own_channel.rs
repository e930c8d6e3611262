//! An event channel of a custom platform: a bit in a page of each domain, and a thread to wake.
//!
//! ```console
//! $ cargo run -p pvio-event-channel --example own_channel
//! ```

use pvio_event_channel::{EventChannel, EventError, Port, two_level::EventPage};
use pvio_ring::shm::HeapMemory;
use std::thread::{self, Thread};

/// One end of a channel, which has the same port in both domains.
struct End {
    port: Port,
    own: EventPage<HeapMemory>,
    peer: EventPage<HeapMemory>,
    peer_thread: Thread,
}

impl EventChannel for End {
    fn port(&self) -> Port {
        self.port
    }

    fn notify(&self) -> Result<(), EventError> {
        // An event that is already pending needs no second wake-up.
        if self.peer.raise(self.port) {
            self.peer_thread.unpark();
        }
        Ok(())
    }

    fn take(&self) -> Result<bool, EventError> {
        Ok(self.own.take(self.port))
    }
}

fn main() -> Result<(), EventError> {
    let (guest, driver) = (HeapMemory::pages(1), HeapMemory::pages(1));
    let end = |own: &HeapMemory, peer: &HeapMemory, peer_thread| {
        let (own, peer) = (EventPage::new(own.clone()), EventPage::new(peer.clone()));
        End { port: Port(7), own, peer, peer_thread }
    };
    let backend = end(&driver, &guest, thread::current());
    let thread = thread::spawn(move || {
        // An event has no payload. A device now reads its rings in shared memory.
        while !backend.take()? {
            thread::park();
        }
        backend.notify()
    });
    let frontend = end(&guest, &driver, thread.thread().clone());
    frontend.notify()?;
    while !frontend.take()? {
        thread::park();
    }
    thread.join().expect("the backend does not panic")
}
