//! Constructors for the kinds of rings.

use super::{FileId, Operations, Uring};
use crate::buf::IoBuf;
use io_uring::{IoUring, squeue};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

const EINVAL: i32 = 22;

/// A ring that executes nothing until it is [enabled](Self::enable) (`IORING_SETUP_R_DISABLED`, Linux
/// 5.10). Files are registered before that: an enabled ring registers no others.
///
/// ```
/// use pvio_runtime::{DisabledUring, Operations, PrivateBuf, Uring, whole};
///
/// let mut ring = DisabledUring::new(8)?;
/// let file = ring.add_main_file(tempfile::tempfile()?.into());
/// let mut ring: Uring<PrivateBuf> = ring.enable(Operations::READ)?;
/// ring.write(file, 0, [whole(PrivateBuf::zeroed(4))], 0).map_err(|_| "full")?;
/// ring.wait(None)?;
/// ring.reap(|done| assert_eq!(done.result, Err(13), "EACCES"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct DisabledUring<B: IoBuf> {
    pub(super) uring: Uring<B>,
    fixed_files: bool,
}

impl<B: IoBuf> DisabledUring<B> {
    /// Creates a ring for up to `slots` concurrent operations, including polls.
    ///
    /// # Errors
    /// An error of `io_uring_setup`; `EPERM` if the system forbids io_uring
    /// (`/proc/sys/kernel/io_uring_disabled`).
    pub fn new(slots: u32) -> io::Result<Self> {
        // Completions need not interrupt the submitting thread, since only that thread reaps them.
        // Older kernels do not support these flags.
        let uring = IoUring::builder()
            .setup_r_disabled()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .setup_single_issuer()
            .setup_submit_all()
            .build(slots)
            .or_else(|_| IoUring::builder().setup_r_disabled().build(slots))?;
        Ok(Self::of(uring, slots))
    }

    /// Creates a ring in which operations that had to wait (a poll, a read of a stream) are
    /// completed only by its thread, when that waits, polls or flushes
    /// (`IORING_SETUP_DEFER_TASKRUN`). So completions do not interrupt the thread, and do not wake
    /// it for each operation while it [waits for several](Uring::wait_for). On kernels before 6.1,
    /// it is the same as [`new`](Self::new).
    ///
    /// # Errors
    /// An error of `io_uring_setup`, as for [`new`](Self::new).
    pub fn gathering(slots: u32) -> io::Result<Self> {
        let uring = IoUring::builder()
            .setup_r_disabled()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_single_issuer()
            .setup_submit_all()
            .build(slots);
        match uring {
            Ok(uring) => {
                let mut ring = Self::of(uring, slots);
                ring.uring.gathering = true;
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
        let mut builder = IoUring::builder();
        let uring = builder.setup_r_disabled().setup_sqpoll(idle).setup_submit_all();
        Ok(Self::of(uring.build(slots)?, slots))
    }

    /// Creates a ring that completes operations by polling the device instead of by interrupts
    /// (`IORING_SETUP_IOPOLL`). It supports only reads and writes with `O_DIRECT` on devices with
    /// poll queues; other operations fail with `EINVAL` or `EOPNOTSUPP`. [`wait`](Uring::wait) never
    /// sleeps.
    ///
    /// # Errors
    /// An error of `io_uring_setup`.
    pub fn polled(slots: u32) -> io::Result<Self> {
        let mut builder = IoUring::builder();
        let uring = builder.setup_r_disabled().setup_iopoll().setup_submit_all();
        Ok(Self::of(uring.build(slots)?, slots))
    }

    fn of(uring: IoUring<squeue::Entry>, slots: u32) -> Self {
        Self { uring: Uring::of(uring, slots), fixed_files: false }
    }

    /// As [`Uring::add_file`].
    pub fn add_file(&mut self, file: OwnedFd) -> FileId {
        self.uring.add_file(file)
    }

    /// Adds the file that most operations use: the kernel looks it up once and not for each
    /// operation. If the kernel does not register it, or a file is registered already, it is used
    /// like any other file.
    pub fn add_main_file(&mut self, file: OwnedFd) -> FileId {
        let registered = self.uring.uring.submitter().register_files(&[file.as_raw_fd()]).is_ok();
        self.uring.main_file |= registered;
        FileId { registered, ..self.add_file(file) }
    }

    /// As [`add_main_file`](Self::add_main_file), and adds `fence` to the ring's registered files.
    /// The kernel releases them when it has finished with the ring: after the last operation, which
    /// may be long after the process has ended.
    ///
    /// # Errors
    /// The error of the registration.
    pub fn add_fenced_file(&mut self, file: OwnedFd, fence: BorrowedFd<'_>) -> io::Result<FileId> {
        let files = [file.as_raw_fd(), fence.as_raw_fd()];
        self.uring.uring.submitter().register_files(&files)?;
        self.uring.main_file = true;
        Ok(FileId { registered: true, ..self.add_file(file) })
    }

    /// Forbids operations on files that are not registered, if the main file is.
    #[must_use]
    pub fn with_registered_files_only(mut self) -> Self {
        self.fixed_files = self.uring.main_file;
        self
    }

    /// Restricts the ring to these operations, irreversibly (`IORING_REGISTER_RESTRICTIONS`), and
    /// enables it for the calling thread, which is the only one that may use it from then on. An
    /// enabled ring accepts no other operation of `io_uring_register` than releasing what is
    /// registered, cancelling, and [registering memory](Uring::register).
    ///
    /// # Errors
    /// An error of `io_uring_register`.
    pub fn enable(self, operations: Operations) -> io::Result<Uring<B>> {
        let submitter = self.uring.uring.submitter();
        let restrict = |cancel| {
            submitter.register_restrictions(&mut operations.restrictions(self.fixed_files, cancel))
        };
        restrict(true).or_else(|error| match error.raw_os_error() {
            // Kernels before 6.0 do not know the operation that cancels.
            Some(EINVAL) => restrict(false),
            _ => Err(error),
        })?;
        submitter.register_enable_rings()?;
        Ok(self.uring)
    }
}

impl<B: IoBuf> Uring<B> {
    /// Creates and enables a ring for [all operations](Operations::ALL); see
    /// [`DisabledUring::new`].
    ///
    /// # Errors
    /// An error of `io_uring_setup` or `io_uring_register`.
    pub fn new(slots: u32) -> io::Result<Self> {
        DisabledUring::new(slots)?.enable(Operations::ALL)
    }

    /// As [`new`](Self::new), for [`DisabledUring::gathering`].
    ///
    /// # Errors
    /// An error of `io_uring_setup` or `io_uring_register`.
    pub fn gathering(slots: u32) -> io::Result<Self> {
        DisabledUring::gathering(slots)?.enable(Operations::ALL)
    }

    /// As [`new`](Self::new), for [`DisabledUring::polled`].
    ///
    /// # Errors
    /// An error of `io_uring_setup` or `io_uring_register`.
    pub fn polled(slots: u32) -> io::Result<Self> {
        DisabledUring::polled(slots)?.enable(Operations::ALL)
    }
}
