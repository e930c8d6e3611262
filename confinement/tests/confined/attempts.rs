//! What a process without rights must not do, and what it must be able to do.

use crate::child::Scenario;
use io_uring::{IoUring, Probe};
use memmap2::MmapMut;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use pvio_runtime::{PrivateBuf, Uring, whole};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{MountFlags, mount};
use rustix::net::{AddressFamily, SocketType, socket};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IoSliceMut, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// Descriptors that were opened before the layers.
pub struct Early {
    root: OwnedFd,
    parent: OwnedFd,
    file: File,
    /// Used to look for another operation of `io_uring_register`.
    probed: Option<IoUring>,
    ring: Option<Uring<PrivateBuf>>,
}

/// What the process has when the attempt begins.
pub struct Held {
    early: Early,
    /// A thread that was started before the filter, and executes what it is sent.
    thread: JoinHandle<()>,
    jobs: Sender<fn()>,
}

pub fn open_early(scenario: &Scenario) -> Early {
    let directory = |path: &str| {
        openat(CWD, path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).expect("a directory")
    };
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(b"held").expect("write");
    Early {
        root: directory("/"),
        parent: directory(&format!("/proc/{}", scenario.parent)),
        file,
        probed: None,
        ring: None,
    }
}

impl Held {
    pub fn after_layers(mut early: Early) -> Self {
        early.probed = IoUring::new(1).ok();
        early.ring = Uring::new(4).ok();
        let (jobs, received) = channel::<fn()>();
        let thread = std::thread::spawn(move || received.into_iter().for_each(|job| job()));
        Self { early, thread, jobs }
    }
}

pub fn attempt(scenario: &Scenario, held: Held) -> io::Result<()> {
    let Held { early, thread, jobs } = held;
    let parent = scenario.parent;
    match scenario.attempt.as_str() {
        "open-file" => File::open("/etc/passwd").map(drop),
        "open-root" => File::open("/").map(drop),
        "open-beneath" => {
            Ok(openat(&early.root, "etc/passwd", OFlags::RDONLY, Mode::empty()).map(drop)?)
        }
        "read-parent" => {
            Ok(openat(&early.parent, "environ", OFlags::RDONLY, Mode::empty()).map(drop)?)
        }
        "open" => File::open(&scenario.target).map(drop),
        "open-for-writing" => File::options().write(true).open(&scenario.target).map(drop),
        "create" => File::create_new(&scenario.target).map(drop),
        "socket" => Ok(socket(AddressFamily::INET, SocketType::STREAM, None).map(drop)?),
        "connect" => std::net::TcpStream::connect(&scenario.target).map(drop),
        "execve" => Err(Command::new("/bin/true").exec()),
        "ptrace" => Ok(nix::sys::ptrace::attach(Pid::from_raw(parent))?),
        "kill" => Ok(nix::sys::signal::kill(Pid::from_raw(parent), None)?),
        "process-vm-readv" => {
            let mut bytes = [0];
            let remote = RemoteIoVec { base: 0x1000, len: 1 };
            let mut local = [IoSliceMut::new(&mut bytes)];
            Ok(process_vm_readv(Pid::from_raw(parent), &mut local, &[remote]).map(drop)?)
        }
        "io-uring-setup" => IoUring::new(1).map(drop),
        "io-uring-probe" => {
            early.probed.expect("a ring").submitter().register_probe(&mut Probe::new())
        }
        "mount" => Ok(mount("tmpfs", "/", "tmpfs", MountFlags::empty(), None)?),
        "chroot" => Ok(rustix::process::chroot("/")?),
        "setuid" => Ok(rustix::thread::set_thread_uid(rustix::fs::Uid::ROOT)?),
        "executable-memory" => MmapMut::map_anon(4096)?.make_exec().map(drop),
        "thread" => std::thread::Builder::new().spawn(|| ()).map(drop),
        "ioctl" => Ok(rustix::io::ioctl_fionread(&early.file).map(drop)?),
        "fcntl" => Ok(rustix::fs::fcntl_setfl(&early.file, OFlags::APPEND)?),
        "raise-limit" => {
            let none = rustix::process::Rlimit { current: None, maximum: None };
            Ok(rustix::process::setrlimit(rustix::process::Resource::Nofile, none)?)
        }
        "socket-on-thread" => {
            jobs.send(|| drop(socket(AddressFamily::INET, SocketType::STREAM, None)))
                .expect("the thread runs");
            drop(jobs);
            thread.join().expect("no panic");
            Ok(())
        }
        "wait" => {
            let waited = io::stdin().read(&mut [0]).map(drop);
            drop((early, thread, jobs));
            waited
        }
        "abort" => std::process::abort(),
        "serve" => serve(early, thread, jobs),
        other => panic!("no attempt {other}"),
    }
}

/// Uses what a device process needs.
fn serve(early: Early, thread: JoinHandle<()>, jobs: Sender<fn()>) -> io::Result<()> {
    let mut map: HashMap<u32, Vec<u8>> = HashMap::new();
    for n in 0..64 {
        map.insert(n, vec![0; 1 << (n % 22)]);
    }
    drop(map);
    std::thread::sleep(Duration::from_millis(2));
    let Early { mut file, ring, .. } = early;
    let mut copy = file.try_clone()?;
    assert_eq!(file.metadata()?.len(), 4);
    file.rewind()?;
    let mut bytes = [0; 4];
    copy.read_exact(&mut bytes)?;
    assert_eq!(&bytes, b"held");
    match ring {
        Some(mut ring) => {
            let file = ring.add_file(copy.into());
            ring.read(file, 0, [whole(PrivateBuf::zeroed(4))], 7).expect("a free slot");
            ring.wait(Some(Duration::from_secs(60)))?;
            let mut read = Vec::new();
            ring.reap(|done| read.push((done.token, done.result)));
            assert_eq!(read, [(7, Ok(4))]);
            // Releases it, with operations in flight.
            drop(ring);
        }
        None => eprintln!("no io_uring here"),
    }
    // A panic prints a backtrace, for which the program cannot be opened.
    assert!(std::panic::catch_unwind(|| panic!("a test")).is_err());
    jobs.send(|| {
        // Memory of a thread comes from another arena, which grows and shrinks.
        for _ in 0..8 {
            drop((0..256).map(|_| vec![1_u8; 64 << 10]).collect::<Vec<_>>());
        }
    })
    .expect("the thread runs");
    drop(jobs);
    thread.join().expect("no panic");
    Ok(())
}
