//! What hostile code tries, and what must happen.

use crate::process::{COMMAND, OUTCOME};
use io_uring::{IoUring, Probe};
use memmap2::MmapMut;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketType, connect, sendto, socket};
use rustix::process::{
    DumpableBehavior, Pid, PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open,
    set_dumpable_behavior, test_kill_process,
};
use rustix::thread::UnshareFlags;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// What must happen at an attempt.
pub enum Expected {
    /// The process is killed with SIGSYS.
    Killed,
    /// The call fails with this error number.
    Error(i32),
}

use Expected::{Error, Killed};

const EACCES: i32 = Errno::ACCESS.raw_os_error();

/// Attempts, in order. The supervisor's descriptors and memory stand for those of any other process.
pub const ATTEMPTS: &[(&str, Expected)] = &[
    ("open-file", Error(EACCES)),
    ("open-held-root", Error(EACCES)),
    ("open-descriptor-of-other", Error(EACCES)),
    ("open-memory-of-other", Error(EACCES)),
    ("prctl", Error(EACCES)),
    ("socket", Killed),
    ("connect", Killed),
    ("send-to-address", Killed),
    ("execve", Killed),
    ("thread", Killed),
    ("kill", Killed),
    ("pidfd-open", Killed),
    ("pidfd-getfd", Killed),
    ("io-uring-setup", Killed),
    ("io-uring-probe", Killed),
    ("mount", Killed),
    ("unshare", Killed),
    ("setuid", Killed),
    ("raise-limit", Killed),
    ("executable-memory", Killed),
    ("ioctl", Killed),
    ("fcntl", Killed),
    ("unlink", Killed),
];

/// Descriptors that were opened before the confinement, as by a supervisor that hands too much over.
pub struct Early {
    pub command: File,
    pub outcome: File,
    record: Option<File>,
    root: OwnedFd,
    supervisor: OwnedFd,
    supervisor_pid: Pid,
    pidfd: OwnedFd,
    unconnected: OwnedFd,
    datagrams: OwnedFd,
    ring: IoUring,
    memory: std::sync::Mutex<Option<MmapMut>>,
}

impl Early {
    pub fn open(directory: &str) -> Self {
        let file = |name: &str| File::options().read(true).write(true).open(name);
        let own = |name| file(&format!("{directory}/{name}")).expect("a file of the test");
        let folder = |path: &str| {
            openat(CWD, path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).expect("a folder")
        };
        let name = std::env::args_os().next().unwrap_or_default();
        let device = name.to_string_lossy().replace("pvio: ", "");
        // In a PID namespace of its own, this process sees no parent.
        let supervisor_pid = std::fs::read_to_string(Path::new(directory).join("supervisor"));
        let supervisor_pid = supervisor_pid.expect("written").parse().expect("a number");
        let supervisor_pid = Pid::from_raw(supervisor_pid).expect("a process");
        Self {
            command: own(&format!("{device}.{COMMAND}")),
            outcome: own(&format!("{device}.{OUTCOME}")),
            record: file(&format!("{directory}/inflight/{device}")).ok(),
            root: folder("/"),
            supervisor: folder(&format!("/proc/{}", supervisor_pid.as_raw_nonzero())),
            supervisor_pid,
            pidfd: pidfd_open(getpid(), PidfdFlags::empty()).expect("a descriptor"),
            unconnected: socket(AddressFamily::UNIX, SocketType::STREAM, None).expect("a socket"),
            datagrams: socket(AddressFamily::UNIX, SocketType::DGRAM, None).expect("a socket"),
            ring: IoUring::new(1).expect("a ring"),
            memory: std::sync::Mutex::new(MmapMut::map_anon(4096).ok()),
        }
    }
}

#[expect(deprecated, reason = "its successor is unsafe, and this call is never executed")]
fn new_user_namespace() -> io::Result<()> {
    Ok(rustix::thread::unshare(UnshareFlags::NEWUSER)?)
}

pub fn attempt(name: &str, early: &Early) -> io::Result<()> {
    let other = early.supervisor_pid;
    let below = |folder: &OwnedFd, path: &str| -> io::Result<()> {
        Ok(openat(folder, path, OFlags::RDONLY, Mode::empty()).map(drop)?)
    };
    let nowhere = || SocketAddrUnix::new("/nowhere/socket");
    match name {
        "open-file" => File::open("/etc/passwd").map(drop),
        "open-held-root" => below(&early.root, "etc/passwd"),
        "open-descriptor-of-other" => below(&early.supervisor, "fd/0"),
        "open-memory-of-other" => below(&early.supervisor, "mem"),
        "prctl" => Ok(set_dumpable_behavior(DumpableBehavior::Dumpable)?),
        "socket" => Ok(socket(AddressFamily::INET, SocketType::STREAM, None).map(drop)?),
        "connect" => Ok(connect(&early.unconnected, &nowhere()?)?),
        "send-to-address" => {
            Ok(sendto(&early.datagrams, b"x", SendFlags::empty(), &nowhere()?).map(drop)?)
        }
        "execve" => Err(Command::new("/bin/true").exec()),
        "thread" => std::thread::Builder::new().spawn(|| ()).map(drop),
        "kill" => Ok(test_kill_process(other)?),
        "pidfd-open" => Ok(pidfd_open(other, PidfdFlags::empty()).map(drop)?),
        "pidfd-getfd" => Ok(pidfd_getfd(&early.pidfd, 0, PidfdGetfdFlags::empty()).map(drop)?),
        "io-uring-setup" => IoUring::new(1).map(drop),
        "io-uring-probe" => early.ring.submitter().register_probe(&mut Probe::new()),
        "mount" => Ok(mount("tmpfs", "/", "tmpfs", MountFlags::empty(), None)?),
        "unshare" => new_user_namespace(),
        "setuid" => Ok(rustix::thread::set_thread_uid(rustix::fs::Uid::ROOT)?),
        "raise-limit" => {
            let none = rustix::process::Rlimit { current: None, maximum: None };
            Ok(rustix::process::setrlimit(rustix::process::Resource::Nofile, none)?)
        }
        "executable-memory" => {
            let memory = early.memory.lock().expect("no panic").take();
            memory.expect("mapped").make_exec().map(drop)
        }
        "ioctl" => Ok(rustix::io::ioctl_fionread(&early.command).map(drop)?),
        "fcntl" => Ok(rustix::fs::fcntl_setfl(&early.command, OFlags::APPEND)?),
        "unlink" => Ok(rustix::fs::unlink("/etc/hostname")?),
        "truncate-record" => {
            let record = early.record.as_ref().ok_or(io::ErrorKind::NotFound)?;
            record.set_len(0)
        }
        other => panic!("no attempt {other}"),
    }
}
