//! A file system with one file, called `disk`, that this process serves (FUSE), so that tests can
//! delay, record or fail operations. Each test program uses a part of this.
#![allow(dead_code)]

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Inode number of the file.
pub const DISK: INodeNo = INodeNo(2);

/// The file. The default operations are those of a file that can only be read and written.
pub trait ServedFile: Send + Sync + 'static {
    /// Time for which the kernel may use attributes that it has read.
    const ATTRIBUTES_VALID: Duration = Duration::from_secs(3600);
    /// Capabilities that the kernel must have.
    const CAPABILITIES: InitFlags = InitFlags::empty();
    /// How the file is opened.
    const OPEN: FopenFlags = FopenFlags::empty();

    /// Returns the length in bytes.
    fn len(&self) -> u64;

    /// Reads at most `len` bytes, fewer at the end of the file.
    fn read(&self, at: u64, len: usize) -> Vec<u8>;

    /// Writes, and replies then or later.
    fn write(&self, at: u64, data: &[u8], reply: ReplyWrite);

    /// Changes the length.
    fn resize(&self, _len: u64) -> Result<(), Errno> {
        Err(Errno::ENOSYS)
    }

    /// Executes `fallocate(2)`.
    fn fallocate(&self, _mode: i32, _at: u64, _len: u64) -> Result<(), Errno> {
        Err(Errno::ENOSYS)
    }

    /// Executes `fsync(2)`.
    fn sync(&self) -> Result<(), Errno> {
        Ok(())
    }

    /// Replies with the attributes of the file or of its directory, then or later.
    fn attributes(&self, ino: INodeNo, reply: ReplyAttr) {
        reply.attr(&Self::ATTRIBUTES_VALID, &attr(ino, self.len()));
    }
}

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

/// Writes into a file in memory, which grows if necessary.
pub fn put(file: &mut Vec<u8>, at: u64, data: &[u8]) {
    let at = at as usize;
    if file.len() < at + data.len() {
        file.resize(at + data.len(), 0);
    }
    file[at..at + data.len()].copy_from_slice(data);
}

/// Returns a part of a file in memory, up to its end.
pub fn part(file: &[u8], at: u64, len: usize) -> Vec<u8> {
    let from = file.len().min(at as usize);
    file[from..file.len().min(from + len)].to_vec()
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

/// The file system with that file.
pub struct OneFile<F>(pub F);

impl<F: ServedFile> Filesystem for OneFile<F> {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        config
            .add_capabilities(F::CAPABILITIES)
            .map_err(|missing| io::Error::other(format!("the kernel lacks {missing:?}")))
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name.to_str() {
            Some("disk") => {
                let attr = attr(DISK, self.0.len());
                reply.entry(&F::ATTRIBUTES_VALID, &attr, Generation(0));
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), F::OPEN);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.0.attributes(ino, reply);
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
        match size.map_or(Ok(()), |size| self.0.resize(size)) {
            Ok(()) => reply.attr(&F::ATTRIBUTES_VALID, &attr(ino, self.0.len())),
            Err(error) => reply.error(error),
        }
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
        reply.data(&self.0.read(offset, size as usize));
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
        self.0.write(offset, data, reply);
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
        finish(self.0.fallocate(mode, offset, length), reply);
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
        finish(self.0.sync(), reply);
    }

    fn destroy(&mut self) {}
}

fn finish(result: Result<(), Errno>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}
