//! State that all connections share.

use super::PART;
use crate::guest::fs::thread::{FsThread, Reply};
use crate::guest::fs::{FsError, FsInfo, Target};
use crate::guest::meter;
use crate::guest::status::Devices;
use std::time::Instant;

/// Maximum number of free buffers.
const SPARE: usize = 16;

/// Data for the live page.
#[derive(Debug)]
pub struct ServerStatus {
    /// The guest's name.
    pub name: String,
    /// Its address, as text.
    pub address: String,
    /// When it started.
    pub started: Instant,
    /// The mounted file system, once known.
    pub fs: Option<Result<FsInfo, FsError>>,
    /// States of the devices.
    pub devices: Devices,
    /// Counters of HTTP requests.
    pub http: meter::Shared,
    /// Counters of reads of the disk.
    pub disk: meter::Shared,
}

/// What all connections share.
#[derive(Debug)]
pub struct Shared {
    /// The disk thread.
    pub fs: FsThread,
    /// Connections may be kept alive.
    pub may_keep_alive: bool,
    spare: Vec<Vec<u8>>,
}

impl Shared {
    /// Returns the state with no connection yet.
    pub fn new(fs: FsThread) -> Self {
        Self { fs, may_keep_alive: true, spare: Vec::new() }
    }

    /// Returns a buffer of that length.
    pub fn take_buffer(&mut self, len: usize) -> Vec<u8> {
        let mut buffer = self.spare.pop().unwrap_or_else(|| Vec::with_capacity(PART));
        buffer.resize(len, 0);
        buffer
    }

    /// Returns a buffer to the free list.
    pub fn return_buffer(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < SPARE {
            self.spare.push(buffer);
        }
    }

    /// Releases what a late reply contains, such as an open file.
    pub fn drop_reply(&mut self, result: Result<Reply, FsError>) {
        match result {
            Ok(Reply::Visited(Target::File { handle, .. })) => self.fs.close(handle),
            Ok(Reply::Read(buffer)) => self.return_buffer(buffer),
            _ => {}
        }
    }
}
