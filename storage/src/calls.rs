//! System calls of an open disk: what a filter that confines its process must allow.
//!
//! [`FILTER`] lists the calls after [`Image::open_as`](crate::image::Image::open_as) has returned
//! and each queue has its [engine](crate::image::Image::engine), until the image is dropped. It
//! covers this crate, the format library and the standard library below them. Rings, grants and
//! event channels, logging, and the control of the process come on top.
//!
//! | thread | number | when it starts | calls |
//! |---|---|---|---|
//! | `disk` | 4 | opening, for qcow2, VMDK, dynamic VHD and overlays | [`FORMAT`] |
//! | `discard` | 2 | opening, for a block device with discard | [`DISCARD`] |
//! | `flush` | 1 | opening, unless read-only or in memory | [`FLUSH`] |
//! | `nbd` | 1 | opening, for a network block device | [`NBD`] |
//! | each queue | 1 | before its engine | [`QUEUE`] |
//!
//! These threads run when opening has returned, so that the calls with which a thread begins
//! (`rseq`, `set_robust_list`, `prctl`) are over. No thread starts later, except in one process with
//! the xenstore part of disks, to open and close them (`open-…`, `close-disk`) and to look up the
//! size of raw images (`image-size`). A process that serves a disk for another one does neither.
//!
//! The allocator of the C library may open `/sys/devices/system/cpu/online` and
//! `/proc/sys/vm/overcommit_memory` at any time, and does without if that fails. A filter must
//! therefore return an error for `openat` instead of killing the process, unless the process has one
//! arena (`MALLOC_ARENA_MAX=1`).
//!
//! Before that, while a disk opens: the same calls, `flock` and `fcntl` with `F_OFD_SETLK` and
//! `F_OFD_GETLK` (locks), `fstat`, `fstatfs`, `ioctl` with the requests of [`OPEN_IOCTLS`],
//! `clone3` or `clone` (threads), and for `io=sqpoll` and `io=iopoll` another io_uring, which
//! is closed again. Files are opened with `open`, `openat2` and `readlink`, and `/sys` and `/proc`
//! are read, unless the descriptors were handed over.

/// Calls that any thread makes: memory, locks between threads, time, and its end.
pub const ANY: &[&str] = &[
    "brk",
    "clock_gettime",
    "clock_nanosleep",
    "close",
    "exit",
    "futex",
    "getrandom",
    "gettid",
    "madvise",
    "mmap",
    "mprotect",
    "mremap",
    "munmap",
    "restart_syscall",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sched_getaffinity",
    "sched_yield",
    "sigaltstack",
    // Descriptors that report completions (eventfd).
    "read",
    "write",
];

/// Calls of a queue's thread. `fcntl` duplicates descriptors (`F_DUPFD_CLOEXEC`) and, in debug
/// builds, checks them before they are closed (`F_GETFD`). `io_uring_register` registers buffers
/// and, at the end, cancels what is in flight and unregisters.
pub const QUEUE: &[&str] = &["io_uring_enter", "io_uring_register", "fcntl"];

/// Operations of a queue's io_uring: of the engine, and of its watches (`IORING_OP_POLL_ADD`).
/// `IORING_OP_FALLOCATE` zeroes ranges and punches holes. The descriptor of an image is file 0.
pub const URING_OPERATIONS: &[&str] = &[
    "IORING_OP_READV",
    "IORING_OP_WRITEV",
    "IORING_OP_FSYNC",
    "IORING_OP_READ_FIXED",
    "IORING_OP_WRITE_FIXED",
    "IORING_OP_POLL_ADD",
    "IORING_OP_FALLOCATE",
    "IORING_OP_READ",
    "IORING_OP_WRITE",
];

/// Calls of the threads that execute the operations of an image format or of an overlay.
/// `ftruncate` makes files grow; `fallocate` punches holes and zeroes ranges; `lseek` (to the end)
/// and `fstat` find out what a file is. On a block device, a hole is punched with
/// [`BLKDISCARD`](DISCARD) or written as zeroes.
pub const FORMAT: &[&str] = &[
    "fallocate",
    "fcntl",
    "fdatasync",
    "fstat",
    "ftruncate",
    "ioctl",
    "lseek",
    "pread64",
    "preadv",
    "pwrite64",
    "pwritev",
    "statx",
];

/// Calls of the threads that discard ranges of a block device: `ioctl` with the requests of
/// [`RUN_IOCTLS`].
pub const DISCARD: &[&str] = &["fstat", "ioctl"];

/// Calls of the thread that flushes a disk. In formats, it also writes tables ([`FORMAT`]) and waits
/// for the flush by an eventfd.
pub const FLUSH: &[&str] = &["eventfd2", "fdatasync"];

/// Calls of the thread of a network block device, with a socket that is connected elsewhere. Without
/// one, reconnecting also needs `socket` and `connect`. `ioctl` is `FIONBIO`; `setsockopt` sets
/// timeouts and `TCP_NODELAY`.
pub const NBD: &[&str] = &["ioctl", "poll", "ppoll", "recvfrom", "sendto", "setsockopt"];

/// Requests of `ioctl` while the disk is open: `BLKDISCARD`, `BLKSECDISCARD`, `FIONBIO`.
pub const RUN_IOCTLS: &[u32] = &[0x1277, 0x127d, 0x5421];

/// Requests of `ioctl` while it opens, in addition: `BLKSSZGET`, `BLKPBSZGET`, `BLKGETSIZE64`.
pub const OPEN_IOCTLS: &[u32] = &[0x1268, 0x127b, 0x8008_1272];

/// All calls of an open disk, whatever its storage. Sorted by group; a call may occur twice.
pub const FILTER: &[&[&str]] = &[ANY, QUEUE, FORMAT, DISCARD, FLUSH, NBD];
