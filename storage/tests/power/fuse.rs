//! Files that other programs of this machine can open and whose bytes are provided by this process:
//! a guest's disk, and the host's file of an image.

use super::SIZE;
use super::storage::{DISK, attr, put};
use super::support::{Deed, Guest};
use fuser::{
    BsdFileFlags, Errno, FileHandle, Filesystem, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use pvio_blkfront::SLOT_BYTES;
use pvio_ring::proto::blkif::Status;
use pvio_storage::engine::record::Record;
use std::ffi::OsStr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

/// A file system with one file: the guest's disk.
pub struct DiskFile(pub Mutex<Guest>);

const LONG: Duration = Duration::from_secs(3600);

impl DiskFile {
    /// Executes an operation on a range in pieces that fit into the ring, all concurrently.
    fn all(&self, offset: u64, len: usize, deed: impl Fn(u64, usize, usize) -> Deed) -> Vec<u8> {
        assert!(offset.is_multiple_of(512) && len.is_multiple_of(512), "{offset}+{len}");
        let deeds: Vec<Deed> = (0..len)
            .step_by(SLOT_BYTES)
            .map(|at| deed((offset + at as u64) / 512, at, (len - at).min(SLOT_BYTES)))
            .collect();
        let found = self.0.lock().unwrap().all(&deeds);
        assert!(found.iter().all(|(status, _)| *status == Status::Okay));
        found.into_iter().flat_map(|(_, data)| data).collect()
    }
}

impl Filesystem for DiskFile {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name.to_str() {
            Some("disk") => reply.entry(&LONG, &attr(DISK, SIZE), Generation(0)),
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&LONG, &attr(ino, SIZE));
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
        let len = u64::from(size).min(SIZE.saturating_sub(offset)) as usize;
        reply.data(&self.all(offset, len, |sector, _, len| Deed::Read(sector, len / 512)));
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
        let deed = |sector, at: usize, len| Deed::Write(sector, data[at..at + len].to_vec());
        self.all(offset, data.len(), deed);
        reply.written(data.len() as u32);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.0.lock().unwrap().one(Deed::Flush);
        reply.ok();
    }

    fn destroy(&mut self) {}
}

/// A file system with one file, in memory: the host's file of an image. All changes are recorded,
/// by any process.
pub struct HostFile {
    bytes: Mutex<Vec<u8>>,
    record: Arc<Record>,
}

impl HostFile {
    /// Creates a file with these contents.
    pub fn new(bytes: Vec<u8>, record: Arc<Record>) -> Self {
        Self { bytes: Mutex::new(bytes), record }
    }

    fn change(&self, at: u64, data: Vec<u8>) {
        let id = self.record.begin(Some((at, data.clone().into())));
        put(&mut self.bytes.lock().unwrap(), at, &data);
        self.record.end(id, true);
    }

    fn len(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }
}

impl Filesystem for HostFile {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name.to_str() {
            Some("disk") => reply.entry(&LONG, &attr(DISK, self.len()), Generation(0)),
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&LONG, &attr(ino, self.len()));
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
        if let Some(size) = size {
            let len = self.len();
            assert!(size >= len, "an image that is cut short");
            if size > len {
                self.change(size, vec![]);
            }
        }
        reply.attr(&LONG, &attr(ino, self.len()));
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
        let bytes = self.bytes.lock().unwrap();
        let from = bytes.len().min(offset as usize);
        reply.data(&bytes[from..bytes.len().min(from + size as usize)]);
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
        self.change(offset, data.to_vec());
        reply.written(data.len() as u32);
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        // FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE.
        let end = if mode & 1 == 0 { offset + length } else { self.len().min(offset + length) };
        assert!(mode & (2 | 16) != 0, "mode {mode}");
        if end > offset {
            self.change(offset, vec![0; (end - offset) as usize]);
        }
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let id = self.record.begin(None);
        self.record.end(id, true);
        reply.ok();
    }

    fn destroy(&mut self) {}
}
