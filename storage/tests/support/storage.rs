//! Storage that hangs when a test requires it. Each test program uses a part of this.
#![allow(dead_code)]

use super::fuse::{DISK, OneFile, ServedFile, attr, part, put};
use fuser::{BackgroundSession, Errno, FopenFlags, INodeNo, InitFlags, ReplyAttr, ReplyWrite};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// The storage. Its locks exclude no other users, like those of a
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
        let session = fuser::spawn_mount(OneFile(self.clone()), dir, &fuser::Config::default());
        let session = session.unwrap();
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
    pub fn set_len(&self, bytes: usize) {
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

impl ServedFile for SlowStorage {
    const ATTRIBUTES_VALID: Duration = Duration::ZERO;
    // Without async_dio the kernel would execute each operation synchronously in a thread of the
    // process.
    const CAPABILITIES: InitFlags = InitFlags::FUSE_POSIX_LOCKS
        .union(InitFlags::FUSE_FLOCK_LOCKS)
        .union(InitFlags::FUSE_ASYNC_DIO);
    const OPEN: FopenFlags =
        FopenFlags::FOPEN_DIRECT_IO.union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);

    fn len(&self) -> u64 {
        self.state().bytes.len() as u64
    }

    fn attributes(&self, ino: INodeNo, reply: ReplyAttr) {
        let mut state = self.state();
        if state.hold_attributes && ino == DISK {
            state.held_attributes.push((ino, reply));
            return;
        }
        reply.attr(&Self::ATTRIBUTES_VALID, &attr(ino, state.bytes.len() as u64));
    }

    fn resize(&self, len: u64) -> Result<(), Errno> {
        self.state().bytes.resize(len as usize, 0);
        Ok(())
    }

    fn read(&self, at: u64, len: usize) -> Vec<u8> {
        part(&self.state().bytes, at, len)
    }

    fn write(&self, at: u64, data: &[u8], reply: ReplyWrite) {
        let mut state = self.state();
        if state.hold_write.is_some_and(|first| data.first() == Some(&first)) {
            state.hold_write = None;
            state.held_write = Some((at, data.into(), reply));
            self.0.changed.notify_all();
            return;
        }
        put(&mut state.bytes, at, data);
        reply.written(data.len() as u32);
    }
}
