//! Opening and closing of a vif's link, on separate threads: Open vSwitch, a network namespace or
//! a driver may block.
#![forbid(unsafe_code)]

use super::link::Link;
use super::queues::OpenLink;
use alloc::format;
use core::task::Poll;
use core::time::Duration;
use pvio_netback::queue::Waker;
use pvio_runtime::{Task, TaskError};
use pvio_xenbus::driver::Fault;

/// Timeout of opening a link.
const OPEN_TIMEOUT: Duration = Duration::from_secs(60);

/// A link that is being opened.
pub(super) struct Opening(Task<Result<Link, Fault>>);

impl Opening {
    /// Starts a thread that calls `open`.
    pub fn begin(
        name: &str,
        open: impl FnOnce() -> Result<Link, Fault> + Send + 'static,
        wake: Waker,
    ) -> Result<Self, Fault> {
        let failed = |e| {
            Fault::new("worker", format!("the thread that opens the NIC's port cannot start: {e}"))
        };
        let task = Task::spawn(format!("open-{name}"), open, move || wake()).map_err(failed)?;
        Ok(Self(task.within(OPEN_TIMEOUT)))
    }

    /// Returns the outcome if the link is open, has failed to open, or the timeout has expired.
    pub fn poll(&mut self) -> Poll<Result<Link, Fault>> {
        self.0.poll().map(outcome)
    }

    /// Waits for the outcome.
    pub fn wait(&mut self) -> Result<Link, Fault> {
        outcome(self.0.wait())
    }
}

fn outcome(opened: Result<Result<Link, Fault>, TaskError>) -> Result<Link, Fault> {
    opened.unwrap_or_else(|error| {
        Err(match error {
            TaskError::Panicked => {
                Fault::new("worker-panicked", "opening the NIC's port failed: the thread panicked")
            }
            TaskError::TimedOut => {
                let text = "opening the NIC's port failed: it takes too long";
                Fault::new("nic-timeout", text).with_remedy("check that Open vSwitch responds")
            }
        })
    })
}

/// Starts a thread that closes a link. Without a thread, the link is closed here, which blocks.
pub(super) fn close(link: OpenLink, wake: Waker) -> Option<Task<()>> {
    Task::spawn("close-nic", move || drop(link), move || wake()).ok()
}
