//! Files that other programs of this machine can open and whose bytes are provided by this process:
//! a guest's disk, and the host's file of an image.

use super::SIZE;
use super::fuse::{ServedFile, part, put};
use super::support::{Deed, Guest};
use fuser::{Errno, ReplyWrite};
use pvio_blkfront::SLOT_BYTES;
use pvio_ring::proto::blkif::Status;
use pvio_storage::engine::record::Record;
use std::sync::{Arc, Mutex};

/// The guest's disk.
pub struct DiskFile(pub Mutex<Guest>);

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

impl ServedFile for DiskFile {
    fn len(&self) -> u64 {
        SIZE
    }

    fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let len = SIZE.saturating_sub(at).min(len as u64) as usize;
        self.all(at, len, |sector, _, len| Deed::Read(sector, len / 512))
    }

    fn write(&self, at: u64, data: &[u8], reply: ReplyWrite) {
        let deed = |sector, at: usize, len| Deed::Write(sector, data[at..at + len].to_vec());
        self.all(at, data.len(), deed);
        reply.written(data.len() as u32);
    }

    fn sync(&self) -> Result<(), Errno> {
        self.0.lock().unwrap().one(Deed::Flush);
        Ok(())
    }
}

/// The host's file of an image, in memory. All changes are recorded, by any process.
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
        let id = self.record.submit(Some((at, data.clone().into())));
        put(&mut self.bytes.lock().unwrap(), at, &data);
        self.record.complete(id, true);
    }
}

impl ServedFile for HostFile {
    fn len(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn read(&self, at: u64, len: usize) -> Vec<u8> {
        part(&self.bytes.lock().unwrap(), at, len)
    }

    fn write(&self, at: u64, data: &[u8], reply: ReplyWrite) {
        self.change(at, data.to_vec());
        reply.written(data.len() as u32);
    }

    fn resize(&self, len: u64) -> Result<(), Errno> {
        assert!(len >= self.len(), "truncated image");
        if len > self.len() {
            self.change(len, vec![]);
        }
        Ok(())
    }

    fn fallocate(&self, mode: i32, at: u64, len: u64) -> Result<(), Errno> {
        // FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE.
        let end = if mode & 1 == 0 { at + len } else { self.len().min(at + len) };
        assert!(mode & (2 | 16) != 0, "mode {mode}");
        if end > at {
            self.change(at, vec![0; (end - at) as usize]);
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), Errno> {
        let id = self.record.submit(None);
        self.record.complete(id, true);
        Ok(())
    }
}
