//! Files of a file system that this process serves (FUSE), so that tests can delay or record
//! operations. Each test program uses a part of this.
#![allow(dead_code)]

use fuser::{
    BackgroundSession, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The one file, called `disk`.
pub const DISK: INodeNo = INodeNo(2);

/// Returns the attributes of a file of that size, or of the directory that contains it.
pub fn attr(ino: INodeNo, size: u64) -> FileAttr {
    let file = ino == DISK;
    FileAttr {
        ino,
        size: if file { size } else { 0 },
        blocks: size / 512,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: if file { FileType::RegularFile } else { FileType::Directory },
        perm: 0o700,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// Writes into a file, which grows if necessary.
pub fn put(file: &mut Vec<u8>, at: u64, data: &[u8]) {
    let at = at as usize;
    if file.len() < at + data.len() {
        file.resize(at + data.len(), 0);
    }
    file[at..at + data.len()].copy_from_slice(data);
}

/// Returns whether this machine lets a process serve files; prints a message otherwise.
pub fn can_serve_files() -> bool {
    if !Path::new("/dev/fuse").exists() {
        eprintln!("SKIPPED: this kernel has not the fuse module; load it");
        return false;
    }
    let id = Command::new("id").arg("-u").output().map(|o| o.stdout).unwrap_or_default();
    if id != b"0\n" {
        eprintln!("SKIPPED: mounting takes root; run this test as root");
        return false;
    }
    super::support::has("umount", "util-linux")
}

/// Storage that hangs when the test requires it. Its locks exclude no other users, like those of a
/// network file system without a lock server, and several writes to one place may be in flight.
#[derive(Clone, Default)]
pub struct SlowStorage(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    /// The next write whose data begins with this byte is held.
    hold_write: Option<u8>,
    held_write: Option<(u64, Vec<u8>, ReplyWrite)>,
    hold_attributes: bool,
    held_attributes: Vec<(INodeNo, ReplyAttr)>,
}

impl SlowStorage {
    pub fn new(bytes: Vec<u8>) -> Self {
        let storage = Self::default();
        storage.state().bytes = bytes;
        storage
    }

    /// Serves the file as `disk` in that directory, until the session is dropped.
    pub fn mount(&self, dir: &Path) -> Mounted {
        let session = fuser::spawn_mount(self.clone(), dir, &fuser::Config::default()).unwrap();
        Mounted { storage: self.clone(), dir: dir.into(), session: Some(session) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.state().bytes.clone()
    }

    /// Holds the next write whose data begins with that byte.
    pub fn hold_write(&self, first: u8) {
        self.state().hold_write = Some(first);
    }

    /// Waits until that write arrives. Returns whether it did within `time`.
    pub fn wait_for_held_write(&self, time: Duration) -> bool {
        let pending = |state: &mut State| state.held_write.is_none();
        let (state, _) = self.0.changed.wait_timeout_while(self.state(), time, pending).unwrap();
        state.held_write.is_some()
    }

    /// Lets the held write reach the file, if there is one, and holds no further writes.
    pub fn release_write(&self) {
        let mut state = self.state();
        state.hold_write = None;
        if let Some((at, data, reply)) = state.held_write.take() {
            put(&mut state.bytes, at, &data);
            drop(state);
            reply.written(data.len() as u32);
        }
    }

    /// Withholds the file's attributes, such as its size, until they are released.
    pub fn hold_attributes(&self) {
        self.state().hold_attributes = true;
    }

    /// Changes the length of the file.
    pub fn resize(&self, bytes: usize) {
        self.state().bytes.resize(bytes, 0);
    }

    /// Returns whether a request for the attributes is waiting.
    pub fn holds_attributes(&self) -> bool {
        !self.state().held_attributes.is_empty()
    }

    /// Replies to all waiting requests for the attributes.
    pub fn release_attributes(&self) {
        let mut state = self.state();
        state.hold_attributes = false;
        let (held, len) = (std::mem::take(&mut state.held_attributes), state.bytes.len());
        drop(state);
        for (ino, reply) in held {
            reply.attr(&Duration::ZERO, &attr(ino, len as u64));
        }
    }
}

/// A mounted storage. Dropping it releases everything it holds and unmounts it.
pub struct Mounted {
    storage: SlowStorage,
    dir: PathBuf,
    session: Option<BackgroundSession>,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.storage.release_write();
        self.storage.release_attributes();
        // The kernel closes the files of a dead process's io_uring some time after its end.
        let unmounted = || Command::new("umount").arg(&self.dir).stderr(Stdio::null()).status();
        let begin = Instant::now();
        while !unmounted().is_ok_and(|status| status.success()) {
            if begin.elapsed() > Duration::from_secs(30) {
                eprintln!("{} stays mounted", self.dir.display());
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        if let Some(session) = self.session.take() {
            let _ = session.umount_and_join();
        }
    }
}

impl Filesystem for SlowStorage {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = InitFlags::FUSE_POSIX_LOCKS | InitFlags::FUSE_FLOCK_LOCKS;
        // Without async_dio the kernel would execute each operation synchronously in a thread of
        // the process.
        let wanted = wanted | InitFlags::FUSE_ASYNC_DIO;
        config
            .add_capabilities(wanted)
            .map_err(|missing| io::Error::other(format!("the kernel lacks {missing:?}")))
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name.to_str() {
            Some("disk") => {
                let len = self.state().bytes.len() as u64;
                reply.entry(&Duration::ZERO, &attr(DISK, len), Generation(0));
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        reply.opened(FileHandle(0), flags);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let mut state = self.state();
        if state.hold_attributes && ino == DISK {
            state.held_attributes.push((ino, reply));
            return;
        }
        reply.attr(&Duration::ZERO, &attr(ino, state.bytes.len() as u64));
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut state = self.state();
        if let Some(size) = size {
            state.bytes.resize(size as usize, 0);
        }
        reply.attr(&Duration::ZERO, &attr(ino, state.bytes.len() as u64));
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let state = self.state();
        let from = state.bytes.len().min(offset as usize);
        reply.data(&state.bytes[from..state.bytes.len().min(from + size as usize)]);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut state = self.state();
        if state.hold_write.is_some_and(|first| data.first() == Some(&first)) {
            state.hold_write = None;
            state.held_write = Some((offset, data.into(), reply));
            self.0.changed.notify_all();
            return;
        }
        put(&mut state.bytes, offset, data);
        reply.written(data.len() as u32);
    }

    fn setlk(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: LockOwner,
        _: u64,
        _: u64,
        _: i32,
        _: u32,
        _: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn destroy(&mut self) {}
}
