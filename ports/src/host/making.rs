//! Creation and removal of a vif's port, on separate threads: Open vSwitch, a network namespace or
//! a driver may block.
#![forbid(unsafe_code)]

use super::other_port::OtherPort;
use super::taps::Taps;
use crate::options::NicOptions;
use alloc::format;
use pvio_netback::queue::Waker;
use pvio_xenbus::driver::Fault;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::string::String;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

/// Timeout of the creation.
const MAKING: Duration = Duration::from_secs(60);

/// What a vif is connected to.
#[derive(Default)]
pub(super) struct Way {
    pub taps: Taps,
    /// Port other than a tap, if configured.
    pub other: Option<OtherPort>,
    /// Configured options.
    pub said: NicOptions,
}

impl Way {
    /// Whether the vif is not connected to anything.
    pub fn is_empty(&self) -> bool {
        self.taps.first().is_none() && self.other.is_none()
    }
}

/// Creation in progress.
pub(super) struct Making {
    outcome: Receiver<Result<Way, Fault>>,
    begun: Instant,
}

impl Making {
    /// Starts a thread that calls `make`.
    pub fn begin(
        name: &str,
        make: impl FnOnce() -> Result<Way, Fault> + Send + 'static,
        wake: Waker,
    ) -> Result<Self, Fault> {
        let (tell, outcome) = sync_channel(1);
        let work = move || {
            let made = catch_unwind(AssertUnwindSafe(make));
            let panicked = || Fault::new("worker-panicked", "making the NIC's port panicked");
            let _ = tell.send(made.unwrap_or_else(|_| Err(panicked())));
            wake();
        };
        let spawned = Builder::new().name(format!("open-{name}")).spawn(work);
        spawned.map_err(|e| Fault::new("worker", format!("no thread to make the NIC: {e}")))?;
        Ok(Self { outcome, begun: Instant::now() })
    }

    /// Returns the outcome if the creation has ended or timed out.
    pub fn poll(&self) -> Option<Result<Way, Fault>> {
        match self.outcome.try_recv() {
            Ok(made) => Some(made),
            Err(TryRecvError::Empty) if self.begun.elapsed() < MAKING => None,
            Err(_) => Some(Err(too_long())),
        }
    }

    /// Waits for the outcome.
    pub fn wait(&self) -> Result<Way, Fault> {
        let time = MAKING.saturating_sub(self.begun.elapsed());
        self.outcome.recv_timeout(time).unwrap_or_else(|error| match error {
            RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected => Err(too_long()),
        })
    }
}

fn too_long() -> Fault {
    let text = "making the NIC's port takes too long: does Open vSwitch answer?";
    Fault::new("nic-timeout", text)
}

/// Removal in progress.
pub(super) struct Unmaking(Receiver<()>);

impl Unmaking {
    /// Starts a thread that drops `way`.
    pub fn begin(way: Way, wake: Waker) -> Self {
        let (tell, over) = sync_channel::<()>(1);
        let work = move || {
            drop(way);
            drop(tell);
            wake();
        };
        // If no thread can be created, the closure and with it `way` is dropped here, which blocks.
        let _ = Builder::new().name(String::from("close-nic")).spawn(work);
        Self(over)
    }

    /// Whether the removal has ended.
    pub fn is_over(&self) -> bool {
        self.0.try_recv() == Err(TryRecvError::Disconnected)
    }
}
