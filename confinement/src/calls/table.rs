//! The permitted system calls, each with what needs it.

use super::Arguments::{Any, Both, Null, OneOf, OwnProcess, With, Without};
use super::{Arguments, Call, Number, ioctls};
use crate::layers::ProcessKind::{self, Disk, ImageHelper, Nic};

const ALL: &[ProcessKind] = &[Disk, Nic, ImageHelper];
const DEVICES: &[ProcessKind] = &[Disk, Nic];
/// Processes that read and write images by blocking calls.
const FILES: &[ProcessKind] = &[Disk, ImageHelper];
const DISK: &[ProcessKind] = &[Disk];
const NIC: &[ProcessKind] = &[Nic];
const HELPER: &[ProcessKind] = &[ImageHelper];

const PROT_EXEC: u32 = libc::PROT_EXEC as u32;
const AT_EMPTY_PATH: u32 = libc::AT_EMPTY_PATH as u32;

/// `fcntl` commands of every process.
const FCNTL: &[u32] = &[
    libc::F_DUPFD_CLOEXEC as u32,
    libc::F_GETFD as u32,
    libc::F_GETFL as u32,
    libc::F_GET_SEALS as u32,
];
/// `fcntl` commands for an image that is being opened.
const FCNTL_OPEN: &[u32] = &[
    libc::F_SETFD as u32,
    libc::F_SETFL as u32,
    libc::F_OFD_SETLK as u32,
    libc::F_OFD_GETLK as u32,
];

/// Operations of `io_uring_register` on a ring that is enabled: registering buffers,
/// unregistering them and the files, cancelling.
const REGISTER: &[u32] = &[0, 1, 3, 24];

const SOL_SOCKET: &[u32] = &[libc::SOL_SOCKET as u32];
const TIMEOUTS: &[u32] = &[libc::SO_RCVTIMEO as u32, libc::SO_SNDTIMEO as u32];
const TCP: &[u32] = &[libc::IPPROTO_TCP as u32];
const NODELAY: &[u32] = &[libc::TCP_NODELAY as u32];
/// `prctl` operations: name of a thread that starts, and installing the filter.
const PRCTL: &[u32] = &[libc::PR_SET_NAME as u32, libc::PR_SET_NO_NEW_PRIVS as u32];
const SO_ERROR: &[u32] = &[libc::SO_ERROR as u32];

macro_rules! calls {
    ($($name:ident $number:ident $arguments:expr, $kinds:ident, $reason:literal;)*) => {
        &[$(Call {
            name: stringify!($name),
            number: libc::$number as Number,
            arguments: $arguments,
            kinds: $kinds,
            reason: $reason,
        }),*]
    };
}

/// Calls that processes make after their start.
pub const CALLS: &[Call] = calls! {
    // Memory. Nothing becomes executable.
    mmap SYS_mmap Without(2, PROT_EXEC), ALL, "allocator; mapping grants";
    mprotect SYS_mprotect Without(2, PROT_EXEC), ALL, "allocator: arenas of threads";
    munmap SYS_munmap Any, ALL, "allocator; unmapping grants; stacks of threads that end";
    mremap SYS_mremap Any, ALL, "allocator: growing large vectors";
    madvise SYS_madvise Any, ALL, "allocator; stacks of threads that end";
    brk SYS_brk Any, ALL, "allocator";

    // Threads that exist already, some of which may still be starting.
    set_robust_list SYS_set_robust_list Any, ALL, "glibc: start of a thread";
    rseq SYS_rseq Any, ALL, "glibc: start of a thread";
    futex SYS_futex Any, ALL, "locks, channels, joining threads";
    sched_yield SYS_sched_yield Any, ALL, "spinning locks";
    sched_getaffinity SYS_sched_getaffinity Any, ALL, "glibc: number of arenas of the allocator";
    gettid SYS_gettid Any, ALL, "abort; thread identifiers";
    exit SYS_exit Any, ALL, "end of a thread";
    exit_group SYS_exit_group Any, ALL, "end of the process";
    sigaltstack SYS_sigaltstack Any, ALL, "std: end of a thread";
    rt_sigprocmask SYS_rt_sigprocmask Any, ALL, "end of a thread; abort";
    rt_sigreturn SYS_rt_sigreturn Any, ALL, "return from a signal handler";
    rt_sigaction SYS_rt_sigaction Any, ALL, "abort restores the default action of SIGABRT";
    getpid SYS_getpid Any, ALL, "abort";
    tgkill SYS_tgkill OwnProcess(0), ALL, "abort: a signal to a thread of the own process";
    restart_syscall SYS_restart_syscall Any, ALL, "waits that SIGSTOP interrupts";

    // Time and randomness.
    clock_gettime SYS_clock_gettime Any, ALL, "where the vDSO has no clock";
    clock_nanosleep SYS_clock_nanosleep Any, ALL, "back-off";
    nanosleep SYS_nanosleep Any, ALL, "back-off, musl";
    getrandom SYS_getrandom Any, ALL, "keys of hash maps";

    // Descriptors that were handed over.
    read SYS_read Any, ALL, "event channels, eventfds, control messages";
    write SYS_write Any, ALL, "unmasking event channels, eventfds, logs";
    readv SYS_readv Any, ALL, "reading into several buffers";
    writev SYS_writev Any, ALL, "logs";
    close SYS_close Any, ALL, "closing what was handed over";
    fcntl SYS_fcntl OneOf(1, FCNTL), ALL, "duplicating a descriptor; its flags; seals of a memfd";
    fstat SYS_fstat Any, ALL, "kind and size of a descriptor";
    newfstatat SYS_newfstatat With(3, AT_EMPTY_PATH), ALL, "glibc: fstat";
    statx SYS_statx With(2, AT_EMPTY_PATH), ALL, "std: metadata of an open file";
    ppoll SYS_ppoll Any, ALL, "waiting for the control socket or a server";

    // The control socket, and the hypervisor of the hosted platform. Both are connected: no call
    // names an address.
    sendmsg SYS_sendmsg Any, ALL, "control messages with descriptors";
    recvmsg SYS_recvmsg Any, ALL, "control messages with descriptors";
    sendto SYS_sendto Null(4), ALL, "control messages; NBD; waking AF_XDP to send";
    recvfrom SYS_recvfrom Null(4), ALL, "control messages; NBD; waking AF_XDP to receive";
    shutdown SYS_shutdown Any, ALL, "ending a connection";
    accept4 SYS_accept4 Any, DEVICES, "the next supervisor, at the socket that was handed over";

    // Requests of the guest.
    io_uring_enter SYS_io_uring_enter Any, DEVICES, "submitting, waiting";
    io_uring_register SYS_io_uring_register OneOf(1, REGISTER), DEVICES,
        "registering the bounce buffers with the first request; releasing a ring";
    ioctl SYS_ioctl OneOf(1, ioctls::DISK), DISK,
        "mapping and copying grants, notifying; discard; size of a block device";
    ioctl SYS_ioctl OneOf(1, ioctls::NIC), NIC,
        "mapping and copying grants, notifying; carrier and offloads of a tap";

    // Blocking calls on images: qcow2, VHD and VMDK, flushes, engines without io_uring.
    pread64 SYS_pread64 Any, FILES, "image metadata; engines without io_uring";
    preadv SYS_preadv Any, FILES, "imago: reading into several buffers";
    lseek SYS_lseek Any, FILES, "size of a block device; allocated ranges";
    pwrite64 SYS_pwrite64 Any, DISK, "image metadata; engines without io_uring";
    pwritev SYS_pwritev Any, DISK, "imago: writing several buffers";
    fdatasync SYS_fdatasync Any, DISK, "flushes";
    fsync SYS_fsync Any, DISK, "flushes of a file whose size changed";
    fallocate SYS_fallocate Any, DISK, "discard, write zeroes, growing an image";
    ftruncate SYS_ftruncate Any, DISK, "growing an image";
    eventfd2 SYS_eventfd2 Any, DISK, "flushing an image format: its completion";
    setsockopt SYS_setsockopt Both((1, SOL_SOCKET), (2, TIMEOUTS)), FILES, "NBD: handshake";
    setsockopt SYS_setsockopt Both((1, TCP), (2, NODELAY)), FILES, "NBD: handshake";
    getsockopt SYS_getsockopt Both((1, SOL_SOCKET), (2, SO_ERROR)), DISK, "NBD: lost connection";

    // Recording and replaying packets: files that were handed over.
    lseek SYS_lseek Any, NIC, "capture files";
    ftruncate SYS_ftruncate Any, NIC, "capture files";

    // Opening images below the roots, which Landlock enforces.
    openat SYS_openat Any, HELPER, "opening an image or a directory";
    openat2 SYS_openat2 Any, HELPER, "opening a layer within its directory";
    readlinkat SYS_readlinkat Any, HELPER, "resolving the path of a layer";
    newfstatat SYS_newfstatat Any, HELPER, "kind of a file";
    statx SYS_statx Any, HELPER, "kind of a file; alignment of direct I/O";
    fstatfs SYS_fstatfs Any, HELPER, "kind of the file system";
    getdents64 SYS_getdents64 Any, HELPER, "devices of a directory";
    flock SYS_flock Any, HELPER, "lock of an image";
    fcntl SYS_fcntl OneOf(1, FCNTL_OPEN), HELPER, "locks of an image; switching O_DIRECT";
    ioctl SYS_ioctl OneOf(1, ioctls::IMAGE_HELPER), HELPER, "size and sectors of a block device";
    fallocate SYS_fallocate Any, HELPER, "probing for holes";
};

/// Calls of x86-64 that newer architectures lack.
#[cfg(target_arch = "x86_64")]
pub const LEGACY: &[Call] = calls! {
    poll SYS_poll Any, ALL, "std: waiting for a socket";
    open SYS_open Any, HELPER, "opening an image";
    readlink SYS_readlink Any, HELPER, "resolving the path of a layer";
    stat SYS_stat Any, HELPER, "kind of a file";
    lstat SYS_lstat Any, HELPER, "kind of a file";
};
/// Calls of x86-64 that newer architectures lack.
#[cfg(not(target_arch = "x86_64"))]
pub const LEGACY: &[Call] = &[];

/// A call that fails with `EACCES` instead of killing the process.
#[derive(Clone, Copy, Debug)]
pub struct Denied {
    /// Name of the call.
    pub name: &'static str,
    /// Its number on this architecture.
    pub number: Number,
    /// Condition under which it is permitted nevertheless.
    pub unless: Option<Arguments>,
    /// What tries it and does without.
    pub reason: &'static str,
}

macro_rules! denied {
    ($($name:ident $number:ident $unless:expr, $reason:literal;)*) => {
        &[$(Denied {
            name: stringify!($name),
            number: libc::$number as Number,
            unless: $unless,
            reason: $reason,
        }),*]
    };
}

/// Calls that libraries try and do without.
pub const DENIED: &[Denied] = denied! {
    openat SYS_openat None, "glibc: memory overcommit; std: program and source for a backtrace";
    readlinkat SYS_readlinkat None, "std: backtrace";
    newfstatat SYS_newfstatat Some(With(3, AT_EMPTY_PATH)), "std: backtrace";
    statx SYS_statx Some(With(2, AT_EMPTY_PATH)), "std: backtrace";
    getcwd SYS_getcwd None, "std: backtrace";
    prctl SYS_prctl Some(OneOf(0, PRCTL)), "glibc: names of memory areas";
    sysinfo SYS_sysinfo None, "glibc: sorting large slices";
};

/// Calls of x86-64 that libraries try and do without.
#[cfg(target_arch = "x86_64")]
pub const LEGACY_DENIED: &[Denied] = denied! {
    open SYS_open None, "std: backtrace";
    readlink SYS_readlink None, "std: backtrace";
    stat SYS_stat None, "std: backtrace";
    lstat SYS_lstat None, "std: backtrace";
};
/// Calls of x86-64 that libraries try and do without.
#[cfg(not(target_arch = "x86_64"))]
pub const LEGACY_DENIED: &[Denied] = &[];
