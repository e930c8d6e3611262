//! Constructors for the kinds of rings.

use super::Uring;
use crate::buf::IoBuf;
use io_uring::IoUring;
use std::io;
use std::time::Duration;

impl<B: IoBuf> Uring<B> {
    /// Creates a ring for up to `slots` concurrent operations, including polls.
    ///
    /// # Errors
    /// An error of `io_uring_setup`; `EPERM` if the system forbids io_uring
    /// (`/proc/sys/kernel/io_uring_disabled`).
    pub fn new(slots: u32) -> io::Result<Self> {
        // Completions need not interrupt the submitting thread, since only that thread reaps them.
        // Older kernels do not support these flags.
        let uring = IoUring::builder()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .setup_single_issuer()
            .setup_submit_all()
            .build(slots)
            .or_else(|_| IoUring::new(slots))?;
        Ok(Self::of(uring, slots))
    }

    /// Creates a ring in which operations that had to wait (a poll, a read of a stream) are
    /// completed only by its thread, when that waits, polls or flushes
    /// (`IORING_SETUP_DEFER_TASKRUN`). So completions do not interrupt the thread, and do not wake
    /// it for each operation while it [waits for several](Self::wait_for). On kernels before 6.1,
    /// it is the same as [`new`](Self::new).
    ///
    /// # Errors
    /// An error of `io_uring_setup`, as for [`new`](Self::new).
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

    /// As [`new`](Self::new), with a kernel thread that polls for submissions
    /// (`IORING_SETUP_SQPOLL`) and sleeps after it found none for `idle` (in whole milliseconds, at
    /// least one). Submission needs no system call while that thread runs, and it occupies a
    /// processor.
    ///
    /// # Errors
    /// An error of `io_uring_setup`.
    pub fn with_kernel_thread(slots: u32, idle: Duration) -> io::Result<Self> {
        let idle = u32::try_from(idle.as_millis()).unwrap_or(u32::MAX).max(1);
        let uring = IoUring::builder().setup_sqpoll(idle).setup_submit_all().build(slots)?;
        Ok(Self::of(uring, slots))
    }

    /// Creates a ring that completes operations by polling the device instead of by interrupts
    /// (`IORING_SETUP_IOPOLL`). It supports only reads and writes with `O_DIRECT` on devices with
    /// poll queues; other operations fail with `EINVAL` or `EOPNOTSUPP`. [`wait`](Self::wait) never
    /// sleeps.
    ///
    /// # Errors
    /// An error of `io_uring_setup`.
    pub fn polled(slots: u32) -> io::Result<Self> {
        let uring = IoUring::builder().setup_iopoll().setup_submit_all().build(slots)?;
        Ok(Self::of(uring, slots))
    }
}
