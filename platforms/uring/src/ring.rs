//! Submitting, waiting, reaping.
#![allow(unsafe_code)]

use crate::backoff::Backoff;
use crate::buf::IoBuf;
use crate::lists::{Lists, Spare};
use io_uring::types::{CancelBuilder, Fd, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};
use pvio_ring::IoSeg;
use pvio_ring::shm::PoolMemory;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// A file the ring owns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileId {
    index: usize,
    /// Whether the kernel knows it as its file 0.
    registered: bool,
}

impl FileId {
    const fn flags(self) -> squeue::Flags {
        if self.registered { squeue::Flags::FIXED_FILE } else { squeue::Flags::empty() }
    }
}

/// What an operation came to: bytes moved, or the system's error.
pub type Errno = i32;

/// Every slot is in flight: reap first. The segments come back.
#[derive(Debug)]
pub struct Full;

/// One finished operation.
#[derive(Debug)]
pub struct Done<'a, B> {
    /// What the submitter called it.
    pub token: u64,
    /// Bytes moved (or ready events, for a poll), or the error number.
    pub result: Result<u32, Errno>,
    /// Its buffers, given back. What is left in here is dropped after the callback.
    pub segments: &'a mut Vec<IoSeg<B>>,
}

/// An io_uring whose operations own their buffers. To be used by the thread that made it.
pub struct Uring<B: IoBuf> {
    uring: IoUring,
    files: Vec<OwnedFd>,
    /// Whether one of them is registered.
    main_file: bool,
    slots: Vec<Slot<B>>,
    free: Vec<u32>,
    spare: Spare<B>,
    /// Operations the kernel has not finished.
    in_flight: usize,
    /// How many of those are polls, which finish only when something happens.
    polls: usize,
    unsubmitted: bool,
    /// Of failures of the kernel to take or to wait that were not the last word.
    backoff: Backoff,
    /// Errors of the next system calls, last first.
    #[cfg(test)]
    failures: Vec<Errno>,
    /// Memory the kernel knows as its buffer 0.
    registered: Option<PoolMemory>,
    /// Operations that were on it.
    on_registered: u64,
    /// Whether what had to be waited for is finished only when the kernel is asked to.
    gathering: bool,
}

struct Slot<B> {
    token: u64,
    lists: Lists<B>,
    poll: bool,
}

const STREAM: u64 = u64::MAX;

/// Which way data goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Read,
    /// A read that does not wait for what is not there (`RWF_NOWAIT`).
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

    /// Takes a file to operate on; closed with the ring.
    pub fn add_file(&mut self, file: OwnedFd) -> FileId {
        self.files.push(file);
        FileId { index: self.files.len() - 1, registered: false }
    }

    /// The same, for the one file most operations are on: the kernel looks it up once, and not for
    /// each of them. Where it does not take it, or has one already, the file is like any other.
    pub fn add_main_file(&mut self, file: OwnedFd) -> FileId {
        let registered = self.uring.submitter().register_files(&[file.as_raw_fd()]).is_ok();
        self.main_file |= registered;
        FileId { registered, ..self.add_file(file) }
    }

    /// As [`add_main_file`](Self::add_main_file), and has the ring's registered file table hold `fence`
    /// too. The kernel releases that table when it is done with the ring: after the last operation, which
    /// may be long after the process has ended.
    ///
    /// # Errors
    /// What the kernel reports when it does not register them.
    pub fn add_fenced_file(&mut self, file: OwnedFd, fence: BorrowedFd<'_>) -> io::Result<FileId> {
        self.uring.submitter().register_files(&[file.as_raw_fd(), fence.as_raw_fd()])?;
        self.main_file = true;
        Ok(FileId { registered: true, ..self.add_file(file) })
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
        self.transfer(file, offset, 0, segments, token, Way::Read)
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
        self.transfer(file, offset, 0, segments, token, Way::Write)
    }

    /// As [`read`](Self::read), but for the first `skip` bytes of the segments: goes on with a
    /// transfer that moved less than all. No operation moves more than 1024 stretches of memory.
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
        self.transfer(file, offset, skip, segments, token, Way::Read)
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
        self.transfer(file, offset, skip, segments, token, Way::Write)
    }

    /// Reads whatever a stream (a tap, a pipe) has next.
    ///
    /// # Errors
    /// [`Full`].
    pub fn read_stream(&mut self, file: FileId, seg: IoSeg<B>, token: u64) -> Result<(), Full> {
        self.transfer(file, STREAM, 0, [seg], token, Way::Read)
    }

    /// The same, but where there is nothing the operation ends at once, with `EAGAIN`. With
    /// `EOPNOTSUPP` for a file of which the kernel does not know how to ask (a tap before Linux 6.4).
    ///
    /// # Errors
    /// [`Full`].
    pub fn try_read_stream(&mut self, file: FileId, seg: IoSeg<B>, token: u64) -> Result<(), Full> {
        self.transfer(file, STREAM, 0, [seg], token, Way::TryRead)
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
        self.transfer(file, STREAM, 0, segments, token, Way::Write)
    }

    /// Brings a file's written data (and the size needed to find it) to the medium.
    ///
    /// # Errors
    /// [`Full`].
    pub fn sync_data(&mut self, file: FileId, token: u64) -> Result<(), Full> {
        let entry = opcode::Fsync::new(self.fd(file)).flags(FsyncFlags::DATASYNC).build();
        self.simple(entry.flags(file.flags()), token, false)
    }

    /// `fallocate` with a mode, for punching holes and writing zeroes.
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

    /// Finishes once when the file becomes readable.
    ///
    /// # Errors
    /// [`Full`].
    pub fn poll_readable(&mut self, file: FileId, token: u64) -> Result<(), Full> {
        const POLLIN: u32 = 1;
        let entry = opcode::PollAdd::new(self.fd(file), POLLIN).build();
        self.simple(entry.flags(file.flags()), token, true)
    }

    /// Operations that own memory or move data and are not finished; polls do not count.
    #[must_use]
    pub fn busy(&self) -> usize {
        self.in_flight - self.polls
    }

    /// How many more operations can be submitted before one is reaped.
    #[must_use]
    pub fn free_slots(&self) -> usize {
        self.free.len()
    }

    /// Calls `each` for every finished operation and returns how many there were.
    pub fn reap(&mut self, mut each: impl FnMut(Done<'_, B>)) -> usize {
        let mut count = 0;
        // Not an iterator over `completion()`: the callback's buffers live in `self.slots`.
        while let Some(entry) = self.uring.completion().next() {
            let index = entry.user_data();
            let Some(slot) = usize::try_from(index).ok().and_then(|i| self.slots.get_mut(i)) else {
                continue;
            };
            let result = u32::try_from(entry.result()).map_err(|_| -entry.result());
            self.in_flight -= 1;
            self.polls -= usize::from(slot.poll);
            // The kernel has finished with the buffers: they may be used and dropped again.
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
        way: Way,
    ) -> Result<(), Full> {
        const RWF_NOWAIT: i32 = 8;
        let fd = self.fd(file);
        let index = self.free.pop().ok_or(Full)?;
        let lists = &mut self.slots[index as usize].lists;
        let segments = segments.into_iter();
        self.spare.fit(lists, segments.size_hint().0);
        let flags = if way == Way::TryRead { RWF_NOWAIT } else { 0 };
        // The kernel writes memory when we read a file.
        let entry = match (lists.fill(segments, skip, way != Way::Write), way) {
            ([v], way)
                if self.registered.as_ref().is_some_and(|memory| registered::is_in(memory, v)) =>
            {
                self.on_registered += 1;
                let (base, len) = (v.base, v.len as u32);
                if way == Way::Write {
                    opcode::WriteFixed::new(fd, base, len, 0).offset(offset).build()
                } else {
                    let read = opcode::ReadFixed::new(fd, base, len, 0).offset(offset);
                    read.rw_flags(flags).build()
                }
            }
            ([v], Way::Write) => {
                opcode::Write::new(fd, v.base, v.len as u32).offset(offset).build()
            }
            ([v], _) => {
                opcode::Read::new(fd, v.base, v.len as u32).offset(offset).rw_flags(flags).build()
            }
            (v, Way::Write) => {
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
        // SAFETY: the buffers and vectors the entry names are owned by the slot, which is neither
        // touched nor dropped before its completion was reaped (`Drop` waits for that); the file
        // is owned by `self.files`, which only grows.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        // There are as many submission entries as slots, and each slot has at most one.
        debug_assert!(pushed.is_ok(), "more submissions than slots");
    }
}

impl<B: IoBuf> Drop for Uring<B> {
    /// Cancels what can be cancelled and waits for the rest: the kernel must not write into
    /// buffers that are gone.
    fn drop(&mut self) {
        let begin = Instant::now();
        while self.in_flight > 0 {
            let _ = self.uring.submit();
            let _ = self.uring.submitter().register_sync_cancel(None, CancelBuilder::any());
            let _ = self.wait(Some(Duration::from_millis(100)));
            self.reap(|_| ());
            if begin.elapsed() > STUCK && self.in_flight > 0 {
                // A device that has answered nothing for half a minute. Leaking is safe, freeing
                // is not.
                tracing::error!(in_flight = self.in_flight, "leaking buffers of stuck I/O");
                for slot in self.slots.drain(..) {
                    std::mem::forget(slot);
                }
                return;
            }
        }
        // The kernel takes a closed ring apart when it has time; a file that is locked must be
        // closed now.
        if self.main_file {
            let _ = self.uring.submitter().unregister_files();
        }
        // It counts as locked until then.
        if self.registered.is_some() {
            let _ = self.uring.submitter().unregister_buffers();
        }
    }
}

/// How long a device may take to finish what was cancelled.
const STUCK: Duration = Duration::from_secs(30);

mod make;
mod registered;
#[cfg(test)]
mod tests;
mod wait;
