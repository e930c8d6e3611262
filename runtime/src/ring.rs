//! Submission, waiting and completion of operations.
#![allow(unsafe_code)]

use crate::backoff::Backoff;
use crate::buf::IoBuf;
use crate::lists::{Lists, Spare};
use io_uring::types::{CancelBuilder, Fd, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};
use pvio_ring::IoSeg;
use pvio_ring::shm::PoolMemory;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// File that the ring owns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileId {
    index: usize,
    /// Whether it is registered with the kernel, as file 0.
    registered: bool,
}

impl FileId {
    const fn flags(self) -> squeue::Flags {
        if self.registered { squeue::Flags::FIXED_FILE } else { squeue::Flags::empty() }
    }
}

/// Error number of the system.
pub type Errno = i32;

/// Error: every slot is in flight; completions must be reaped first. The segments are dropped.
#[derive(Debug)]
pub struct Full;

/// Completed operation.
#[derive(Debug)]
pub struct Done<'a, B> {
    /// Token that the submitter chose.
    pub token: u64,
    /// Number of bytes moved (or the ready events, for a poll), or the error number.
    pub result: Result<u32, Errno>,
    /// Segments of the operation, which the caller may take. The remaining ones are dropped after
    /// the callback.
    pub segments: &'a mut Vec<IoSeg<B>>,
}

/// An io_uring whose operations own their buffers. It must be used by the thread that enabled it,
/// and executes only the [`Operations`] that it was enabled for.
pub struct Uring<B: IoBuf> {
    uring: IoUring,
    files: Vec<OwnedFd>,
    /// Whether a file is registered.
    main_file: bool,
    slots: Vec<Slot<B>>,
    free: Vec<u32>,
    spare: Spare<B>,
    /// Number of operations in flight.
    in_flight: usize,
    /// Number of polls in flight, which complete only when their event occurs.
    polls: usize,
    unsubmitted: bool,
    /// Delay after transient errors of submission and waiting.
    backoff: Backoff,
    /// Errors of the next system calls, in reverse order.
    #[cfg(test)]
    failures: Vec<Errno>,
    /// Memory registered with the kernel, as buffer 0.
    registered: Option<PoolMemory>,
    /// Number of operations on registered memory.
    on_registered: u64,
    /// Whether operations that had to wait complete only when the thread enters the kernel.
    gathering: bool,
}

struct Slot<B> {
    token: u64,
    lists: Lists<B>,
    poll: bool,
}

const STREAM: u64 = u64::MAX;

/// Kind of a transfer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum IoKind {
    Read,
    /// A read that fails instead of waiting (`RWF_NOWAIT`).
    TryRead,
    Write,
}

impl<B: IoBuf> Uring<B> {
    fn of(uring: IoUring, slots: u32) -> Self {
        let slot = || Slot { token: 0, lists: Lists::small(), poll: false };
        Self {
            uring,
            files: Vec::new(),
            main_file: false,
            slots: (0..slots).map(|_| slot()).collect(),
            free: (0..slots).rev().collect(),
            spare: Spare::default(),
            in_flight: 0,
            polls: 0,
            unsubmitted: false,
            backoff: Backoff::default(),
            #[cfg(test)]
            failures: Vec::new(),
            registered: None,
            on_registered: 0,
            gathering: false,
        }
    }

    /// Adds a file for operations. It is closed with the ring.
    pub fn add_file(&mut self, file: OwnedFd) -> FileId {
        self.files.push(file);
        FileId { index: self.files.len() - 1, registered: false }
    }

    /// Reads from a byte offset of a file into the segments, in order.
    ///
    /// # Errors
    /// [`Full`].
    pub fn read(
        &mut self,
        file: FileId,
        offset: u64,
        segments: impl IntoIterator<Item = IoSeg<B>>,
        token: u64,
    ) -> Result<(), Full> {
        self.transfer(file, offset, 0, segments, token, IoKind::Read)
    }

    /// Writes the segments, in order, at a byte offset of a file.
    ///
    /// # Errors
    /// [`Full`].
    pub fn write(
        &mut self,
        file: FileId,
        offset: u64,
        segments: impl IntoIterator<Item = IoSeg<B>>,
        token: u64,
    ) -> Result<(), Full> {
        self.transfer(file, offset, 0, segments, token, IoKind::Write)
    }

    /// As [`read`](Self::read), but skips the first `skip` bytes of the segments, to continue after
    /// a short transfer. An operation has at most 1024 memory ranges.
    ///
    /// # Errors
    /// [`Full`].
    pub fn read_rest(
        &mut self,
        file: FileId,
        offset: u64,
        skip: usize,
        segments: impl IntoIterator<Item = IoSeg<B>>,
        token: u64,
    ) -> Result<(), Full> {
        self.transfer(file, offset, skip, segments, token, IoKind::Read)
    }

    /// As [`write`](Self::write), but for the first `skip` bytes of the segments.
    ///
    /// # Errors
    /// [`Full`].
    pub fn write_rest(
        &mut self,
        file: FileId,
        offset: u64,
        skip: usize,
        segments: impl IntoIterator<Item = IoSeg<B>>,
        token: u64,
    ) -> Result<(), Full> {
        self.transfer(file, offset, skip, segments, token, IoKind::Write)
    }

    /// Reads the next data of a stream (a tap, a pipe).
    ///
    /// # Errors
    /// [`Full`].
    pub fn read_stream(&mut self, file: FileId, seg: IoSeg<B>, token: u64) -> Result<(), Full> {
        self.transfer(file, STREAM, 0, [seg], token, IoKind::Read)
    }

    /// As [`read_stream`](Self::read_stream), but completes with `EAGAIN` immediately if there is
    /// no data. Completes with `EOPNOTSUPP` if the file does not support that (a tap before Linux
    /// 6.4).
    ///
    /// # Errors
    /// [`Full`].
    pub fn try_read_stream(&mut self, file: FileId, seg: IoSeg<B>, token: u64) -> Result<(), Full> {
        self.transfer(file, STREAM, 0, [seg], token, IoKind::TryRead)
    }

    /// Writes to a stream (a tap, a pipe).
    ///
    /// # Errors
    /// [`Full`].
    pub fn write_stream(
        &mut self,
        file: FileId,
        segments: impl IntoIterator<Item = IoSeg<B>>,
        token: u64,
    ) -> Result<(), Full> {
        self.transfer(file, STREAM, 0, segments, token, IoKind::Write)
    }

    /// Flushes a file's written data (and the size needed to read it) to the storage device.
    ///
    /// # Errors
    /// [`Full`].
    pub fn sync_data(&mut self, file: FileId, token: u64) -> Result<(), Full> {
        let entry = opcode::Fsync::new(self.fd(file)).flags(FsyncFlags::DATASYNC).build();
        self.simple(entry.flags(file.flags()), token, false)
    }

    /// Calls `fallocate` with a mode, for punching holes and writing zeroes.
    ///
    /// # Errors
    /// [`Full`].
    pub fn allocate(
        &mut self,
        file: FileId,
        mode: i32,
        offset: u64,
        len: u64,
        token: u64,
    ) -> Result<(), Full> {
        let entry = opcode::Fallocate::new(self.fd(file), len).offset(offset).mode(mode).build();
        self.simple(entry.flags(file.flags()), token, false)
    }

    /// Polls the file; completes once, when it becomes readable.
    ///
    /// # Errors
    /// [`Full`].
    pub fn poll_readable(&mut self, file: FileId, token: u64) -> Result<(), Full> {
        const POLLIN: u32 = 1;
        let entry = opcode::PollAdd::new(self.fd(file), POLLIN).build();
        self.simple(entry.flags(file.flags()), token, true)
    }

    /// Returns the number of operations in flight that own memory or move data; polls are not
    /// counted.
    #[must_use]
    pub fn busy(&self) -> usize {
        self.in_flight - self.polls
    }

    /// Returns the number of operations that can be submitted before one must be reaped.
    #[must_use]
    pub fn free_slots(&self) -> usize {
        self.free.len()
    }

    /// Calls `each` for every completed operation and returns their number.
    pub fn reap(&mut self, mut each: impl FnMut(Done<'_, B>)) -> usize {
        let mut count = 0;
        // Not an iterator over `completion()`: the callback borrows from `self.slots`.
        while let Some(entry) = self.uring.completion().next() {
            let index = entry.user_data();
            let Some(slot) = usize::try_from(index).ok().and_then(|i| self.slots.get_mut(i)) else {
                continue;
            };
            let result = u32::try_from(entry.result()).map_err(|_| -entry.result());
            self.in_flight -= 1;
            self.polls -= usize::from(slot.poll);
            // The kernel has finished with the buffers: the caller may use and drop them again.
            each(Done { token: slot.token, result, segments: slot.lists.segments() });
            self.spare.reclaim(&mut slot.lists);
            self.free.push(index as u32);
            count += 1;
        }
        count
    }

    fn fd(&self, file: FileId) -> Fd {
        if file.registered {
            return Fd(0);
        }
        let raw: RawFd = self.files.get(file.index).map_or(-1, AsRawFd::as_raw_fd);
        Fd(raw)
    }

    fn transfer(
        &mut self,
        file: FileId,
        offset: u64,
        skip: usize,
        segments: impl IntoIterator<Item = IoSeg<B>>,
        token: u64,
        kind: IoKind,
    ) -> Result<(), Full> {
        const RWF_NOWAIT: i32 = 8;
        let fd = self.fd(file);
        let index = self.free.pop().ok_or(Full)?;
        let lists = &mut self.slots[index as usize].lists;
        let segments = segments.into_iter();
        self.spare.fit(lists, segments.size_hint().0);
        let flags = if kind == IoKind::TryRead { RWF_NOWAIT } else { 0 };
        // A read from a file is a write to memory.
        let entry = match (lists.fill(segments, skip, kind != IoKind::Write), kind) {
            ([v], kind)
                if self.registered.as_ref().is_some_and(|memory| registered::is_in(memory, v)) =>
            {
                self.on_registered += 1;
                let (base, len) = (v.base, v.len as u32);
                if kind == IoKind::Write {
                    opcode::WriteFixed::new(fd, base, len, 0).offset(offset).build()
                } else {
                    let read = opcode::ReadFixed::new(fd, base, len, 0).offset(offset);
                    read.rw_flags(flags).build()
                }
            }
            ([v], IoKind::Write) => {
                opcode::Write::new(fd, v.base, v.len as u32).offset(offset).build()
            }
            ([v], _) => {
                opcode::Read::new(fd, v.base, v.len as u32).offset(offset).rw_flags(flags).build()
            }
            (v, IoKind::Write) => {
                opcode::Writev::new(fd, v.as_ptr().cast(), v.len() as u32).offset(offset).build()
            }
            (v, _) => opcode::Readv::new(fd, v.as_ptr().cast(), v.len() as u32)
                .offset(offset)
                .rw_flags(flags)
                .build(),
        };
        self.push(entry.flags(file.flags()), index, token, false);
        Ok(())
    }

    fn simple(&mut self, entry: squeue::Entry, token: u64, poll: bool) -> Result<(), Full> {
        let index = self.free.pop().ok_or(Full)?;
        self.push(entry, index, token, poll);
        Ok(())
    }

    fn push(&mut self, entry: squeue::Entry, index: u32, token: u64, poll: bool) {
        let slot = &mut self.slots[index as usize];
        (slot.token, slot.poll) = (token, poll);
        self.in_flight += 1;
        self.polls += usize::from(poll);
        self.unsubmitted = true;
        let entry = entry.user_data(u64::from(index));
        // SAFETY: the buffers and vectors that the entry names are owned by the slot, which is
        // neither accessed nor dropped before its completion is reaped (`Drop` waits for that); the
        // file is owned by `self.files`, which only grows.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        // There are as many submission entries as slots, and each slot has at most one.
        debug_assert!(pushed.is_ok(), "more submissions than slots");
    }
}

impl<B: IoBuf> Drop for Uring<B> {
    /// Cancels all operations and waits for those that cannot be cancelled: the kernel must not
    /// write to freed buffers.
    fn drop(&mut self) {
        let begin = Instant::now();
        while self.in_flight > 0 {
            let _ = self.uring.submit();
            let _ = self.uring.submitter().register_sync_cancel(None, CancelBuilder::any());
            let _ = self.wait(Some(Duration::from_millis(100)));
            self.reap(|_| ());
            if begin.elapsed() > STUCK && self.in_flight > 0 {
                // The device has not completed its operations for 30 seconds. Leaking the buffers
                // is safe, freeing them is not.
                tracing::error!(
                    in_flight = self.in_flight,
                    "buffers of I/O that does not complete are leaked"
                );
                for slot in self.slots.drain(..) {
                    std::mem::forget(slot);
                }
                return;
            }
        }
        // The kernel releases a closed ring asynchronously, but a locked file must be closed now.
        if self.main_file {
            let _ = self.uring.submitter().unregister_files();
        }
        // The memory counts as locked until it is unregistered.
        if self.registered.is_some() {
            let _ = self.uring.submitter().unregister_buffers();
        }
    }
}

/// Timeout for the completion of cancelled operations.
const STUCK: Duration = Duration::from_secs(30);

#[cfg(any(test, feature = "test-utils"))]
mod attempt;
mod make;
mod operations;
mod registered;
#[cfg(test)]
mod tests;
mod wait;

pub use make::DisabledUring;
pub use operations::Operations;
