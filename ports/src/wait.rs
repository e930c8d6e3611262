//! Requirements of a worker on its port beyond packets: the port is the worker's only wait point.
#![forbid(unsafe_code)]

use super::NetPort;
use core::time::Duration;
use pvio_runtime::{WaitPoint, Wrapper};
use std::io;

/// Port at which a thread can wait for packets and for watched descriptors.
pub trait WaitPort: NetPort + WaitPoint {
    /// Processes received packets and completed operations. After it, watches may have
    /// [fired](WaitPoint::fired).
    ///
    /// # Errors
    /// The port cannot continue.
    fn poll(&mut self) -> io::Result<()>;

    /// Returns whether [`poll`](Self::poll) has work. Never waits, and is cheap if there is none.
    ///
    /// # Errors
    /// A system error.
    fn has_work(&mut self) -> io::Result<bool>;

    /// Waits for `time` even if packets arrive, so that packets accumulate. The default
    /// implementation returns immediately.
    ///
    /// # Errors
    /// A system error.
    fn gather(&mut self, time: Duration) -> io::Result<()> {
        let _ = time;
        Ok(())
    }
}

impl<T: NetPort + Wrapper> WaitPort for T
where
    T::Inner: WaitPort,
{
    fn poll(&mut self) -> io::Result<()> {
        self.inner().poll()
    }

    fn has_work(&mut self) -> io::Result<bool> {
        self.inner().has_work()
    }

    fn gather(&mut self, time: Duration) -> io::Result<()> {
        self.inner().gather(time)
    }
}
