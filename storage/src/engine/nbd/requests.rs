//! Requests in flight: their parts without a reply, the data to send, and the received data. No
//! I/O.

use super::handshake::Export;
use super::wire::{self, Chunk, Hole, SimpleReply, chunk, cmd, export};
use crate::engine::offload::Job;
use crate::engine::{EngineError, Io};
use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;
use rangemap::RangeSet;
use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

/// Bytes to send at a time, unless one request has more.
const OUT: usize = 256 << 10;
/// Length of the writes of zeroes, in bytes, where the server has no command for zeroing.
const ZEROES: u64 = 1 << 20;
/// Maximum number of separate ranges of a read's data that were received. A server that sends them in
/// order needs one.
const RANGES: usize = 1024;
/// Maximum length of trim and zeroing requests, which carry no data.
const RANGE: u64 = 1 << 30;

/// All requests without a reply.
pub struct Requests {
    export: Export,
    jobs: Vec<Option<Active>>,
    free: Vec<usize>,
    /// By cookie, in the order of sending. Cookies are never reused.
    parts: BTreeMap<u64, Part>,
    next: u64,
    unsent: VecDeque<u64>,
    out: Vec<u8>,
    sent: usize,
    reading: Reading,
}

struct Active {
    job: Job,
    parts: u32,
    error: Option<EngineError>,
}

struct Part {
    job: usize,
    command: u16,
    offset: u64,
    len: u32,
    /// Offset of the data in the job's buffer; `None` for zeroes and for requests without data.
    data: Option<usize>,
    /// Ranges of a read's data that were received, or that the current chunk announces.
    received: RangeSet<u32>,
    error: Option<EngineError>,
}

/// The expected next data from the server.
#[derive(Clone, Copy)]
enum Reading {
    Head,
    /// Data of a read: its offset in the job's buffer, and its remaining length.
    Data {
        cookie: u64,
        at: usize,
        left: usize,
        done: bool,
    },
}

/// A range exceeds its request.
const TOO_MUCH: Lost = Lost("it sends more data than requested");

/// The server violated the protocol or announced its shutdown: the connection is no longer usable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lost(pub &'static str);

impl Requests {
    pub fn new(export: Export) -> Self {
        Self {
            export,
            jobs: Vec::new(),
            free: Vec::new(),
            parts: BTreeMap::new(),
            next: 1,
            unsent: VecDeque::new(),
            out: Vec::with_capacity(OUT),
            sent: 0,
            reading: Reading::Head,
        }
    }

    /// Returns whether no request is waiting for a reply.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Adds a job to send.
    pub fn add(&mut self, job: Job) {
        let (command, sector, sectors, step) = match job.io {
            Io::Read { sector } => (cmd::READ, sector, job.data.len() as u64 / 512, None),
            Io::Write { sector } => (cmd::WRITE, sector, job.data.len() as u64 / 512, None),
            // By the protocol, completed writes of a server without this flag are durable.
            Io::Flush if !self.export.can(export::SEND_FLUSH) => return job.finish(Ok(())),
            Io::Flush => (cmd::FLUSH, 0, 0, Some(RANGE)),
            // The protocol cannot report whether a server has other copies of the data.
            Io::Discard { secure: true, .. } => {
                return job.finish(Err(EngineError::Unsupported));
            }
            Io::Discard { sector, sectors, secure: false } => {
                (cmd::TRIM, sector, sectors, Some(RANGE))
            }
            Io::WriteZeroes { sector, sectors } if self.export.can(export::SEND_WRITE_ZEROES) => {
                (cmd::WRITE_ZEROES, sector, sectors, Some(RANGE))
            }
            Io::WriteZeroes { sector, sectors } => (cmd::WRITE, sector, sectors, Some(ZEROES)),
        };
        if command == cmd::TRIM && !self.export.can(export::SEND_TRIM) {
            return job.finish(Err(EngineError::Unsupported));
        }
        let (offset, len) = (sector.saturating_mul(512), sectors.saturating_mul(512));
        let most = u64::from(self.export.max_block) & !4095;
        let moves_data = step.is_none();
        let step = if command == cmd::WRITE || moves_data {
            most.min(step.unwrap_or(most))
        } else {
            RANGE
        };
        let index = self.free.pop().unwrap_or_else(|| {
            self.jobs.push(None);
            self.jobs.len() - 1
        });
        let (mut parts, mut done) = (0, 0);
        while done < len || parts == 0 {
            let n = (len - done).min(step);
            let part = Part {
                job: index,
                command,
                offset: offset + done,
                len: n as u32,
                data: moves_data.then_some(done as usize),
                received: RangeSet::new(),
                error: None,
            };
            let cookie = self.next;
            self.next += 1;
            self.parts.insert(cookie, part);
            self.unsent.push_back(cookie);
            parts += 1;
            done += n;
        }
        self.jobs[index] = Some(Active { job, parts, error: None });
    }

    /// Queues all requests without a reply again, in their original order, after a reconnect.
    pub fn requeue(&mut self, export: Export) {
        self.export = export;
        (self.reading, self.sent) = (Reading::Head, 0);
        self.out.clear();
        self.unsent.clear();
        for (_, mut part) in core::mem::take(&mut self.parts) {
            (part.received, part.error) = (RangeSet::new(), None);
            let cookie = self.next;
            self.next += 1;
            self.parts.insert(cookie, part);
            self.unsent.push_back(cookie);
        }
    }

    /// Fails all requests.
    pub fn fail(&mut self, error: EngineError) {
        self.parts.clear();
        self.unsent.clear();
        self.out.clear();
        self.sent = 0;
        self.free.clear();
        for active in self.jobs.drain(..).flatten() {
            active.job.finish(Err(error));
        }
    }

    /// Returns the next data to send; empty if there is none.
    pub fn outgoing(&mut self) -> &[u8] {
        if self.sent == self.out.len() {
            self.out.clear();
            self.sent = 0;
            while self.out.len() < OUT
                && let Some(cookie) = self.unsent.pop_front()
            {
                let Some(part) = self.parts.get(&cookie) else { continue };
                let head = wire::Request::new(part.command, cookie, part.offset, part.len);
                self.out.extend(head.as_bytes());
                if part.command == cmd::WRITE {
                    let end = self.out.len() + part.len as usize;
                    let job = self.jobs.get(part.job).and_then(Option::as_ref);
                    if let (Some(active), Some(from)) = (job, part.data) {
                        self.out.extend(&active.job.data[from..from + part.len as usize]);
                    }
                    self.out.resize(end, 0);
                }
            }
        }
        &self.out[self.sent..]
    }

    /// Records that `bytes` of that data were sent.
    pub fn sent(&mut self, bytes: usize) {
        self.sent += bytes;
    }

    /// Processes received data from the front of `bytes`. Returns the rest, which is incomplete.
    pub fn incoming<'a>(&mut self, mut bytes: &'a [u8]) -> Result<&'a [u8], Lost> {
        loop {
            bytes = match self.reading {
                Reading::Data { cookie, at, left, done } => {
                    let (now, rest) = bytes.split_at(left.min(bytes.len()));
                    self.put(cookie, at, now)?;
                    let (at, left) = (at + now.len(), left - now.len());
                    if left > 0 {
                        self.reading = Reading::Data { cookie, at, left, done };
                        return Ok(rest);
                    }
                    self.reading = Reading::Head;
                    if done {
                        self.complete_part(cookie)?;
                    }
                    rest
                }
                Reading::Head => match self.head(bytes)? {
                    Some(rest) => rest,
                    None => return Ok(bytes),
                },
            };
        }
    }

    /// Parses one header, if it is complete.
    fn head<'a>(&mut self, bytes: &'a [u8]) -> Result<Option<&'a [u8]>, Lost> {
        let Ok((magic, bytes)) = U32::ref_from_prefix(bytes) else { return Ok(None) };
        match magic.get() {
            wire::SIMPLE_REPLY => {
                let Ok((reply, rest)) = SimpleReply::ref_from_prefix(bytes) else {
                    return Ok(None);
                };
                let cookie = reply.cookie.get();
                let part = self.part(cookie)?;
                part.error = failure(reply.error.get())?;
                let read = part.command == cmd::READ && part.error.is_none();
                if read && self.export.structured {
                    return Err(Lost("it sends a simple reply to a read"));
                }
                if read {
                    self.expect(cookie, 0, None, true)?;
                } else {
                    self.complete_part(cookie)?;
                }
                Ok(Some(rest))
            }
            wire::STRUCTURED_REPLY if self.export.structured => self.chunk(bytes),
            _ => Err(Lost("it sends an unknown reply")),
        }
    }

    /// Parses one chunk, after its magic number, if it is complete.
    fn chunk<'a>(&mut self, bytes: &'a [u8]) -> Result<Option<&'a [u8]>, Lost> {
        let Ok((head, mut rest)) = Chunk::ref_from_prefix(bytes) else { return Ok(None) };
        let (kind, cookie, len) = (head.kind.get(), head.cookie.get(), head.len.get());
        let done = head.flags.get() & chunk::DONE != 0;
        let read = self.part(cookie)?.command == cmd::READ;
        match kind {
            chunk::NONE if len == 0 => {}
            chunk::OFFSET_DATA if read && len > 8 => {
                let Ok((offset, rest)) = U64::ref_from_prefix(rest) else { return Ok(None) };
                let from = self.part(cookie)?.offset;
                let into =
                    offset.get().checked_sub(from).ok_or(Lost("it sends data of another range"))?;
                self.expect(cookie, into, Some(len - 8), done)?;
                return Ok(Some(rest));
            }
            chunk::OFFSET_HOLE if read && len == 12 => {
                let Ok((hole, after)) = Hole::ref_from_prefix(rest) else { return Ok(None) };
                self.hole(cookie, hole.offset.get(), hole.len.get())?;
                rest = after;
            }
            // The error text of the chunk is ignored, but must be received in full.
            _ if kind & chunk::ERROR != 0 && (6..=4096 + 16).contains(&len) => {
                let Some((message, after)) = rest.split_at_checked(len as usize) else {
                    return Ok(None);
                };
                let error = U32::ref_from_prefix(message).map_or(0, |(error, _)| error.get());
                let error = failure(error)?;
                // An error chunk with error number 0 is treated as an error.
                self.part(cookie)?.error = error.or(Some(EngineError::Os(5)));
                rest = after;
            }
            _ => return Err(Lost("it sends an invalid chunk")),
        }
        if done {
            self.complete_part(cookie)?;
        }
        Ok(Some(rest))
    }

    fn part(&mut self, cookie: u64) -> Result<&mut Part, Lost> {
        self.parts.get_mut(&cookie).ok_or(Lost("it sends a reply without a request"))
    }

    /// Expects the data of a read next.
    fn expect(&mut self, cookie: u64, into: u64, len: Option<u32>, done: bool) -> Result<(), Lost> {
        let part = self.part(cookie)?;
        let len = len.unwrap_or(part.len);
        let at = part.receive(into, len)?;
        self.reading = Reading::Data { cookie, at, left: len as usize, done };
        Ok(())
    }

    fn put(&mut self, cookie: u64, at: usize, bytes: &[u8]) -> Result<(), Lost> {
        let job = self.part(cookie)?.job;
        let job = self.jobs.get_mut(job).and_then(Option::as_mut);
        let room = job.and_then(|active| active.job.data.get_mut(at..at + bytes.len()));
        room.ok_or(TOO_MUCH)?.copy_from_slice(bytes);
        Ok(())
    }

    fn hole(&mut self, cookie: u64, offset: u64, len: u32) -> Result<(), Lost> {
        let part = self.part(cookie)?;
        let into = offset.checked_sub(part.offset).ok_or(TOO_MUCH)?;
        let (job, at) = (part.job, part.receive(into, len)?);
        let job = self.jobs.get_mut(job).and_then(Option::as_mut);
        let room = job.and_then(|active| active.job.data.get_mut(at..at + len as usize));
        room.ok_or(TOO_MUCH)?.fill(0);
        Ok(())
    }

    /// Completes a part and, with the last part, its job.
    fn complete_part(&mut self, cookie: u64) -> Result<(), Lost> {
        let part = self.parts.remove(&cookie).ok_or(Lost("it sends a reply without a request"))?;
        if part.command == cmd::READ && part.error.is_none() && !part.is_received() {
            self.parts.insert(cookie, part);
            return Err(Lost("it sends less data than requested"));
        }
        let Some(slot) = self.jobs.get_mut(part.job) else { return Ok(()) };
        let Some(active) = slot else { return Ok(()) };
        active.error = active.error.or(part.error);
        active.parts -= 1;
        if active.parts == 0
            && let Some(active) = slot.take()
        {
            self.free.push(part.job);
            active.job.finish(active.error.map_or(Ok(()), Err));
        }
        Ok(())
    }
}

impl Part {
    /// Notes that `len` bytes at distance `into` of its data are received next. Returns their offset
    /// in the job's buffer. The server chooses both values; the protocol permits any order of the
    /// ranges, but none that overlap.
    fn receive(&mut self, into: u64, len: u32) -> Result<usize, Lost> {
        let end = into.checked_add(len.into()).filter(|end| *end <= self.len.into());
        let (Ok(begin), Some(end)) = (u32::try_from(into), end) else { return Err(TOO_MUCH) };
        let range = begin..end as u32;
        if range.is_empty() {
            return Err(Lost("it sends an invalid chunk"));
        }
        if self.received.overlaps(&range) {
            return Err(Lost("it sends the same data twice"));
        }
        self.received.insert(range);
        if self.received.len() > RANGES {
            return Err(Lost("it sends data in too many pieces"));
        }
        // The sum cannot overflow: the buffer is in memory.
        Ok(self.data.unwrap_or_default() + begin as usize)
    }

    /// Returns whether all data of a read was received.
    fn is_received(&self) -> bool {
        self.received.gaps(&(0..self.len)).next().is_none()
    }
}

/// Converts an error number of the protocol. The numbers are those of Linux.
fn failure(error: u32) -> Result<Option<EngineError>, Lost> {
    const ENOTSUP: u32 = 95;
    match error {
        0 => Ok(None),
        ENOTSUP => Ok(Some(EngineError::Unsupported)),
        wire::SHUTDOWN => Err(Lost("it is shutting down")),
        errno => Ok(Some(EngineError::Os(i32::try_from(errno).unwrap_or(5)))),
    }
}

#[cfg(test)]
mod tests;
