//! Opening and closing of a vif's link, on separate threads: Open vSwitch, a network namespace or
//! a driver may block.
#![forbid(unsafe_code)]

use super::link::Link;
use alloc::format;
use pvio_netback::queue::Waker;
use pvio_xenbus::driver::Fault;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::string::String;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

/// Timeout of opening a link.
const OPEN_TIMEOUT: Duration = Duration::from_secs(60);

/// A link that is being opened.
pub(super) struct Opening {
    outcome: Receiver<Result<Link, Fault>>,
    begun: Instant,
}

impl Opening {
    /// Starts a thread that calls `open`.
    pub fn begin(
        name: &str,
        open: impl FnOnce() -> Result<Link, Fault> + Send + 'static,
        wake: Waker,
    ) -> Result<Self, Fault> {
        let (sender, outcome) = sync_channel(1);
        let work = move || {
            let opened = catch_unwind(AssertUnwindSafe(open));
            let panicked = || {
                Fault::new("worker-panicked", "opening the NIC's port failed: the thread panicked")
            };
            let _ = sender.send(opened.unwrap_or_else(|_| Err(panicked())));
            wake();
        };
        let spawned = Builder::new().name(format!("open-{name}")).spawn(work);
        spawned.map_err(|e| {
            Fault::new("worker", format!("the thread that opens the NIC's port cannot start: {e}"))
        })?;
        Ok(Self { outcome, begun: Instant::now() })
    }

    /// Returns the outcome if the link is open, has failed to open, or the timeout has expired.
    pub fn poll(&self) -> Option<Result<Link, Fault>> {
        match self.outcome.try_recv() {
            Ok(opened) => Some(opened),
            Err(TryRecvError::Empty) if self.begun.elapsed() < OPEN_TIMEOUT => None,
            Err(_) => Some(Err(timeout())),
        }
    }

    /// Waits for the outcome.
    pub fn wait(&self) -> Result<Link, Fault> {
        let time = OPEN_TIMEOUT.saturating_sub(self.begun.elapsed());
        self.outcome.recv_timeout(time).unwrap_or_else(|error| match error {
            RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected => Err(timeout()),
        })
    }
}

fn timeout() -> Fault {
    let text = "opening the NIC's port failed: it takes too long";
    Fault::new("nic-timeout", text).with_remedy("check that Open vSwitch responds")
}

/// A link that is being closed.
pub(super) struct Closing(Receiver<()>);

impl Closing {
    /// Starts a thread that drops `link`.
    pub fn begin(link: Link, wake: Waker) -> Self {
        let (sender, outcome) = sync_channel::<()>(1);
        let work = move || {
            drop(link);
            drop(sender);
            wake();
        };
        // If no thread can be created, the closure and with it `link` is dropped here, which
        // blocks.
        let _ = Builder::new().name(String::from("close-nic")).spawn(work);
        Self(outcome)
    }

    /// Whether the link is closed.
    pub fn is_over(&self) -> bool {
        self.0.try_recv() == Err(TryRecvError::Disconnected)
    }
}
