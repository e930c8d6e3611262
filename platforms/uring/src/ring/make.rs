//! The kinds of rings there are.

use super::Uring;
use crate::buf::IoBuf;
use io_uring::IoUring;
use std::io;
use std::time::Duration;

impl<B: IoBuf> Uring<B> {
    /// A ring for up to `slots` operations at a time, polls included.
    ///
    /// # Errors
    /// What `io_uring_setup` says; `EPERM` where the system forbids io_uring
    /// (`/proc/sys/kernel/io_uring_disabled`).
    pub fn new(slots: u32) -> io::Result<Self> {
        // Completions need no interrupt of the submitting thread, which alone reaps them; older
        // kernels do not know the flags and need none.
        let uring = IoUring::builder()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .setup_single_issuer()
            .setup_submit_all()
            .build(slots)
            .or_else(|_| IoUring::new(slots))?;
        Ok(Self::of(uring, slots))
    }

    /// The same, but what has to be waited for (a poll, a read of a stream) is finished by its own
    /// thread only, while that waits, looks or flushes (`IORING_SETUP_DEFER_TASKRUN`). So it is not
    /// interrupted by it at work, and not woken for each while it [waits for
    /// several](Self::wait_for). Kernels before 6.1 make a ring as [`new`](Self::new) does.
    ///
    /// # Errors
    /// What `io_uring_setup` says, as for [`new`](Self::new).
    pub fn gathering(slots: u32) -> io::Result<Self> {
        let uring = IoUring::builder()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_single_issuer()
            .setup_submit_all()
            .build(slots);
        match uring {
            Ok(uring) => {
                let mut ring = Self::of(uring, slots);
                ring.gathering = true;
                Ok(ring)
            }
            Err(_) => Self::new(slots),
        }
    }

    /// As [`new`](Self::new), with a thread of the kernel's that looks for submissions by itself
    /// (`IORING_SETUP_SQPOLL`), and sleeps once it found none for `idle` (whole milliseconds, at
    /// least one): submitting is no system call then, and a processor is busy meanwhile.
    ///
    /// # Errors
    /// What `io_uring_setup` says.
    pub fn with_kernel_thread(slots: u32, idle: Duration) -> io::Result<Self> {
        let idle = u32::try_from(idle.as_millis()).unwrap_or(u32::MAX).max(1);
        let uring = IoUring::builder().setup_sqpoll(idle).setup_submit_all().build(slots)?;
        Ok(Self::of(uring, slots))
    }

    /// A ring whose operations are finished by looking at the device and not by its interrupts
    /// (`IORING_SETUP_IOPOLL`): for nothing but reads and writes, by `O_DIRECT`, of what has queues
    /// for that; all else fails with `EINVAL` or `EOPNOTSUPP`. [`wait`](Self::wait) never sleeps.
    ///
    /// # Errors
    /// What `io_uring_setup` says.
    pub fn polled(slots: u32) -> io::Result<Self> {
        let uring = IoUring::builder().setup_iopoll().setup_submit_all().build(slots)?;
        Ok(Self::of(uring, slots))
    }
}
