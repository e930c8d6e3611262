//! The process that can open nothing.

use crate::messages::{Job, receive, receive_descriptor, send, send_descriptor};
use crate::support::alone;
use pvio_blkback::engine::{BlockEngine, EngineError, Io};
use pvio_ring::IoSeg;
use pvio_ring::shm::{HeapMemory, Region};
use pvio_storage::calls;
use pvio_storage::engine::nbd::Dial;
use pvio_storage::engine::wait::DiskEngine;
use pvio_storage::image::spec::NbdServer;
use pvio_storage::image::{Disk, HandedFiles, Image, Resolved};
use seccompiler::{BpfMap, TargetArch, compile_from_json};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitStatus, Stdio, exit};
use std::sync::{Arc, Mutex};

/// Set in the process that is confined.
const CONFINED: &str = "PVIO_TEST_CONFINED";
/// Bytes of an operation.
const STEP: usize = 64 << 10;

/// System calls that a process without paths and networks cannot make usefully.
const FORBIDDEN: &[&str] = &[
    "accept4",
    "access",
    "connect",
    "creat",
    "execve",
    "execveat",
    "faccessat2",
    "flock",
    "kill",
    "lstat",
    "newfstatat",
    "open",
    "openat",
    "openat2",
    "ptrace",
    "readlink",
    "readlinkat",
    "socket",
    "stat",
    "unlink",
];

/// Calls of the process itself: its messages, its end, and the harness of the test.
const OWN: &[&str] = &["exit_group", "recvmsg", "sendmsg", "recvfrom", "sendto"];

/// A process that serves a disk, and what it reported.
pub struct Confined {
    child: Child,
    pub socket: UnixStream,
    output: File,
}

/// The contents of a disk before and after the process has written to it.
pub struct Outcome {
    pub before: Vec<u8>,
    pub after: Vec<u8>,
}

impl Confined {
    /// Starts a process that serves a disk from these descriptors.
    pub fn start(disk: &Disk, named: &HandedFiles, resolved: &Resolved) -> Self {
        let (socket, theirs) = UnixStream::pair().unwrap();
        let output = tempfile::tempfile().unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "confined::process_without_paths_serves_disk", "--nocapture"])
            .env(CONFINED, "1")
            // With several arenas, the C library opens files of /sys and /proc.
            .env("MALLOC_ARENA_MAX", "1")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::from(File::create("/dev/null").unwrap()))
            .spawn()
            .unwrap();
        let job =
            Job { disk: disk.clone(), named: named.records(), description: resolved.description() };
        send(&socket, &job);
        send_descriptor(&socket, output.as_fd());
        for fd in named.descriptors().chain(resolved.files.descriptors()) {
            send_descriptor(&socket, fd);
        }
        Self { child, socket, output }
    }

    /// Waits until the process has opened the disk. Returns the code of the error if it fails.
    pub fn opened(&self) -> Result<(), String> {
        receive(&self.socket)
    }

    /// Lets the process serve.
    pub fn proceed(&self) {
        (&self.socket).write_all(b"x").unwrap();
    }

    /// Waits for the end of the process, which must serve the disk without an error.
    pub fn finish(mut self) -> Outcome {
        let status = self.child.wait().unwrap();
        assert!(status.success(), "the confined process: {status}");
        let size = self.output.metadata().unwrap().len() as usize;
        let mut all = vec![0; size];
        self.output.read_exact_at(&mut all, 0).unwrap();
        let after = all.split_off(size / 2);
        Outcome { before: all, after }
    }

    pub fn kill(mut self) -> ExitStatus {
        self.child.kill().unwrap();
        self.child.wait().unwrap()
    }
}

/// Returns the contents of a disk.
pub fn read_all(engine: &mut DiskEngine<HeapMemory>) -> Vec<u8> {
    let size = engine.geometry().sectors as usize * 512;
    let mut all = vec![0; size];
    for (index, part) in all.chunks_mut(STEP).enumerate() {
        let buf = HeapMemory::pages(STEP / 4096);
        let segment = IoSeg { buf: buf.clone(), offset: 0, len: part.len() };
        let sector = (index * STEP / 512) as u64;
        alone(engine, Io::Read { sector }, Some(segment)).unwrap();
        buf.read_bytes(0, part).unwrap();
    }
    all
}

/// Inverts every third step, zeroes and discards others, and flushes.
fn change(engine: &mut DiskEngine<HeapMemory>, before: &[u8]) {
    let sectors = engine.geometry().sectors;
    let step = (STEP / 512) as u64;
    for (index, sector) in (0..sectors).step_by(STEP / 512).enumerate() {
        let count = step.min(sectors - sector);
        let io = match index % 3 {
            0 => {
                let buf = HeapMemory::pages(STEP / 4096);
                let old = &before[sector as usize * 512..][..count as usize * 512];
                let new: Vec<u8> = old.iter().map(|byte| !byte).collect();
                buf.write_bytes(0, &new).unwrap();
                let segment = IoSeg { buf, offset: 0, len: count as usize * 512 };
                alone(engine, Io::Write { sector }, Some(segment)).unwrap();
                continue;
            }
            1 if index % 2 == 0 => Io::WriteZeroes { sector, sectors: count },
            1 => Io::Discard { sector, sectors: count, secure: false },
            _ => continue,
        };
        match alone(engine, io, None) {
            Ok(()) | Err(EngineError::Unsupported) => {}
            // A file system without this operation.
            Err(EngineError::Os(95)) => {}
            Err(error) => panic!("{io:?}: {error}"),
        }
    }
    alone(engine, Io::Flush, None).unwrap();
}

/// Applies a filter to all threads that kills the process at a call that it does not allow.
fn filter(default: &str, listed: &str, names: &[&str]) {
    let names: BTreeSet<&str> = names.iter().copied().collect();
    let rules: Vec<_> = names.iter().map(|name| serde_json::json!({ "syscall": name })).collect();
    let json = serde_json::json!({
        "main": { "mismatch_action": default, "match_action": listed, "filter": rules }
    });
    let arch: TargetArch = std::env::consts::ARCH.try_into().unwrap();
    let programs: BpfMap = compile_from_json(json.to_string().as_bytes(), arch).unwrap();
    seccompiler::apply_filter_all_threads(&programs["main"]).unwrap();
}

/// Asks the parent for connections.
struct AskParent(Mutex<UnixStream>);

impl Dial for AskParent {
    fn dial(&self, _: &NbdServer) -> io::Result<OwnedFd> {
        let socket = self.0.lock().unwrap();
        send(&socket, &"dial");
        Ok(receive_descriptor(&socket))
    }
}

/// Runs in the confined process.
fn serve() {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned().unwrap());
    let Job { disk, named, description } = receive(&socket);
    let output = File::from(receive_descriptor(&socket));
    let fds = |count: usize| (0..count).map(|_| receive_descriptor(&socket)).collect();
    let named_fds: Vec<_> = fds(named.len());
    let layer_fds: Vec<_> = fds(description.files.len());
    let resolved = Resolved::new(&disk, description, layer_fds).unwrap();
    let dial = AskParent(Mutex::new(socket.try_clone().unwrap()));
    let files = HandedFiles::new(named, named_fds).unwrap();
    let files = files.with(resolved.files).redialing(Arc::new(dial));

    filter("allow", "kill_process", FORBIDDEN);
    let opened = Image::open_handed(&disk, files, &resolved.geometry);
    let report = opened.as_ref().map(drop).map_err(|error| error.code().to_owned());
    let Ok(image) = opened else {
        send(&socket, &report);
        return;
    };
    let mut engine = image.engine(4).unwrap();
    let allowed: Vec<&str> = calls::FILTER.iter().copied().flatten().chain(OWN).copied().collect();
    filter("kill_process", "allow", &allowed);
    send(&socket, &report);
    io::Read::read_exact(&mut &socket, &mut [0]).unwrap();
    let before = read_all(&mut engine);
    if !image.geometry().read_only {
        change(&mut engine, &before);
    }
    let after = read_all(&mut engine);
    output.write_all_at(&[before, after].concat(), 0).unwrap();
    drop((engine, image));
    // Not through the end of the test harness, which makes other calls.
    exit(0);
}

#[test]
fn process_without_paths_serves_disk() {
    if std::env::var_os(CONFINED).is_some() {
        return serve();
    }
    let disk: Disk = "[rw]ram:1M".parse().unwrap();
    let outcome = crate::formats::served(&disk);
    assert!(outcome.before.iter().all(|byte| *byte == 0));
    assert!(outcome.after.iter().any(|byte| *byte != 0));
}

/// Without this, a process that the filter does not confine would pass all other tests.
#[test]
fn filter_kills_process_that_opens_a_file() {
    const OPENER: &str = "PVIO_TEST_OPENER";
    if std::env::var_os(OPENER).is_some() {
        filter("allow", "kill_process", FORBIDDEN);
        let _ = File::open("/dev/null");
        return;
    }
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "confined::filter_kills_process_that_opens_a_file"])
        .env(OPENER, "1")
        .stdout(Stdio::null())
        .status()
        .unwrap();
    const SIGSYS: i32 = 31;
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(SIGSYS), "{status}");
}
