//! A capture whose packets are read in one process and written to a file by another one.
//!
//! The connection is a pair of `SOCK_SEQPACKET` sockets. A message is a header, and the bytes of one
//! packet. A message arrives as a whole or not at all, so a sender that is killed leaves no part of
//! one, and its successor continues on the same socket. A sender's first message has no packet and
//! tells that it captures. The reader ends the capture when it shuts down its sending side; the
//! sender then sends a last message without a packet.
#![forbid(unsafe_code)]

use crate::pcapng::CapturedPacket;
use crate::wrappers::capture::{Probe, SNAPLEN};
use crate::{Checksum, Gso, Offload};
use alloc::vec;
use alloc::vec::Vec;
use core::time::Duration;
use pvio_ring::proto::netif::GsoKind;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, SocketFlags, SocketType,
    recv, sendmsg, shutdown, socketpair,
};
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::time::{Instant, SystemTime};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Interval at which a sender without packets checks whether the reader has ended the capture.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Number of packets after which a sender with packets checks the same.
const BATCH: usize = 256;

const END: u8 = 0;
const PACKET: u8 = 1;
const BEGIN: u8 = 2;

/// What precedes the bytes of a packet.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    /// Nanoseconds since 1970.
    when: u64,
    /// Number of packets not captured since the last message.
    lost: u64,
    /// Length of the packet before it was truncated.
    len: u32,
    /// [`PACKET`], [`BEGIN`] or [`END`].
    kind: u8,
    sent: u8,
    /// 0: unknown, 1: validated, 2: blank.
    checksum: u8,
    /// The [`GsoKind`], or 0.
    gso: u8,
    checksum_start: u16,
    checksum_offset: u16,
    gso_size: u16,
    reserved: u16,
}

impl Header {
    fn new(packet: &CapturedPacket, lost: u64) -> Self {
        let since = packet.when.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let (checksum, checksum_start, checksum_offset) = match packet.offload.checksum {
            Checksum::Unknown => (0, 0, 0),
            Checksum::Validated => (1, 0, 0),
            Checksum::Partial { start, offset } => (2, start, offset),
        };
        let (gso, gso_size) = packet.offload.gso.map_or((0, 0), |gso| (gso.kind as u8, gso.size));
        Self {
            when: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX),
            lost,
            len: u32::try_from(packet.len).unwrap_or(u32::MAX),
            kind: PACKET,
            sent: packet.sent.into(),
            checksum,
            gso,
            checksum_start,
            checksum_offset,
            gso_size,
            reserved: 0,
        }
    }

    const fn without_packet(kind: u8, lost: u64) -> Self {
        Self {
            when: 0,
            lost,
            len: 0,
            kind,
            sent: 0,
            checksum: 0,
            gso: 0,
            checksum_start: 0,
            checksum_offset: 0,
            gso_size: 0,
            reserved: 0,
        }
    }

    fn offload(&self) -> Offload {
        let checksum = match self.checksum {
            1 => Checksum::Validated,
            2 => Checksum::Partial { start: self.checksum_start, offset: self.checksum_offset },
            _ => Checksum::Unknown,
        };
        let kind = [GsoKind::TcpV4, GsoKind::TcpV6].into_iter().find(|k| *k as u8 == self.gso);
        Offload { checksum, gso: kind.map(|kind| Gso { size: self.gso_size, kind }) }
    }
}

/// Captures packets at a probe and sends them, until the reader ends the capture. `snaplen` is the
/// maximum number of bytes of each. While the reader is slower than the packets, those are not
/// captured and counted. The thread must not be unparked by others.
///
/// # Errors
/// Another capture is active, or the reader has closed its socket.
pub fn send_captured(probe: &Probe, snaplen: usize, socket: &OwnedFd) -> io::Result<()> {
    let reader = probe.open(snaplen).map_err(io::Error::other)?;
    send(socket, &Header::without_packet(BEGIN, 0), &[])?;
    let mut told = 0;
    let mut unsent = || {
        let lost = reader.lost();
        lost.saturating_sub(std::mem::replace(&mut told, lost))
    };
    while !has_ended(socket)? {
        let mut left = 0..BATCH;
        reader.read(POLL_INTERVAL, |packet| {
            send(socket, &Header::new(packet, unsent()), &packet.data)?;
            Ok(left.next().is_some())
        })?;
    }
    send(socket, &Header::without_packet(END, unsent()), &[])
}

fn send(socket: &OwnedFd, header: &Header, data: &[u8]) -> io::Result<()> {
    let parts = [IoSlice::new(header.as_bytes()), IoSlice::new(data)];
    loop {
        // Without NOSIGNAL, a reader that has ended would end this process with SIGPIPE.
        let mut none = SendAncillaryBuffer::default();
        match sendmsg(socket, &parts, &mut none, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Returns whether the reader has shut down its sending side.
fn has_ended(socket: &OwnedFd) -> io::Result<bool> {
    match recv(socket, &mut [0], RecvFlags::DONTWAIT) {
        // It sends nothing.
        Ok(_) => Ok(true),
        Err(Errno::AGAIN | Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The reader's end of the connection.
#[derive(Debug)]
pub struct CaptureSocket {
    socket: OwnedFd,
    buffer: Vec<u8>,
    packet: CapturedPacket,
    lost: u64,
    begun: bool,
    ended: bool,
}

/// What a message was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Received {
    Packet,
    Other,
}

impl CaptureSocket {
    /// Creates a connection, and returns the sender's end as well.
    ///
    /// # Errors
    /// The system has no descriptor.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (socket, sender) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let buffer = vec![0; const { size_of::<Header>() + SNAPLEN }];
        let packet = CapturedPacket::new(SNAPLEN);
        Ok((Self { socket, buffer, packet, lost: 0, begun: false, ended: false }, sender))
    }

    /// Waits until packets are captured, for at most `most`, and returns whether they are.
    ///
    /// # Errors
    /// Those of [`read`](Self::read).
    pub fn wait_for_begin(&mut self, most: Duration) -> io::Result<bool> {
        let begin = Instant::now();
        while !self.begun && !self.ended && begin.elapsed() < most {
            self.wait(POLL_INTERVAL)?;
            // The first message is not a packet.
            self.receive()?;
        }
        Ok(self.begun)
    }

    /// Waits for packets, for at most `most`, and calls `each` for every available packet until it
    /// returns `false`.
    ///
    /// # Errors
    /// The error of `each`, or of the socket; a message is invalid.
    pub fn read(
        &mut self,
        most: Duration,
        mut each: impl FnMut(&CapturedPacket) -> io::Result<bool>,
    ) -> io::Result<()> {
        self.wait(most)?;
        while !self.ended {
            match self.receive()? {
                Some(Received::Packet) if !each(&self.packet)? => break,
                Some(_) => {}
                None => break,
            }
        }
        Ok(())
    }

    /// Ends the capture, and calls `each` for the packets that were captured until now. Waits for
    /// the sender for at most `most`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn end(
        &mut self,
        most: Duration,
        mut each: impl FnMut(&CapturedPacket) -> io::Result<bool>,
    ) -> io::Result<()> {
        shutdown(&self.socket, Shutdown::Write)?;
        let begin = Instant::now();
        while !self.ended && begin.elapsed() < most {
            self.read(POLL_INTERVAL, &mut each)?;
        }
        Ok(())
    }

    /// Returns the number of packets that were not captured because no record was free.
    #[must_use]
    pub const fn lost(&self) -> u64 {
        self.lost
    }

    /// Waits for a message, for at most `most`.
    fn wait(&self, most: Duration) -> io::Result<()> {
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        let timeout = Timespec::try_from(most).map_err(io::Error::other)?;
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Receives a message, if there is one.
    fn receive(&mut self) -> io::Result<Option<Received>> {
        let len = match recv(&self.socket, &mut self.buffer[..], RecvFlags::DONTWAIT) {
            Ok((len, _)) => len,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if len == 0 {
            self.ended = true;
            return Ok(None);
        }
        let message = self.buffer.get(..len).unwrap_or_default();
        let Ok((header, data)) = Header::read_from_prefix(message) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a captured packet is invalid"));
        };
        self.lost = self.lost.saturating_add(header.lost);
        self.begun |= header.kind != END;
        self.ended |= header.kind == END;
        if header.kind != PACKET {
            return Ok(Some(Received::Other));
        }
        let len = usize::try_from(header.len).unwrap_or(usize::MAX).max(data.len());
        let since = Duration::from_nanos(header.when);
        let when = SystemTime::UNIX_EPOCH.checked_add(since).unwrap_or(SystemTime::UNIX_EPOCH);
        self.packet.set(data, len, (when, header.sent != 0), header.offload());
        Ok(Some(Received::Packet))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(data: &[u8], offload: Offload) -> CapturedPacket {
        let mut packet = CapturedPacket::new(SNAPLEN);
        packet.fill(data, SNAPLEN, offload, true);
        packet
    }

    #[test]
    fn packet_keeps_its_properties_across_processes() {
        let (mut reader, sender) = CaptureSocket::pair().unwrap();
        let gso = Some(Gso { size: 1448, kind: GsoKind::TcpV6 });
        let checksum = Checksum::Partial { start: 34, offset: 16 };
        let long = packet(&vec![7; SNAPLEN], Offload { checksum, gso });
        let short = packet(&[1, 2, 3], Offload { checksum: Checksum::Validated, gso: None });
        send(&sender, &Header::new(&long, 2), &long.data).unwrap();
        send(&sender, &Header::new(&short, 3), &short.data).unwrap();
        let mut all = Vec::new();
        let mut each = |found: &CapturedPacket| {
            all.push((found.data.clone(), found.len, found.when, found.sent, found.offload));
            Ok(true)
        };
        reader.read(Duration::ZERO, &mut each).unwrap();
        assert!(!has_ended(&sender).unwrap());
        for (found, sent) in all.iter().zip([&long, &short]) {
            let sent = (sent.data.clone(), sent.len, sent.when, sent.sent, sent.offload);
            assert!(*found == sent, "{:?} {:?}", found.1, sent.1);
        }
        assert_eq!((all.len(), reader.lost()), (2, 5));
    }

    #[test]
    fn capture_without_packets_ends_when_reader_ends_it() {
        let (mut reader, sender) = CaptureSocket::pair().unwrap();
        let probe = Probe::default();
        let serve = std::thread::spawn({
            let probe = probe.clone();
            move || send_captured(&probe, SNAPLEN, &sender)
        });
        assert!(reader.wait_for_begin(Duration::from_secs(60)).unwrap());
        assert!(probe.open(60).is_err(), "it is being captured");
        reader.end(Duration::from_secs(60), |_| Ok(true)).unwrap();
        assert!(reader.ended);
        serve.join().unwrap().unwrap();
        assert!(probe.open(60).is_ok(), "it can be captured again");
    }

    #[test]
    fn sender_ends_when_reader_is_gone_and_malformed_message_is_rejected() {
        let (mut reader, sender) = CaptureSocket::pair().unwrap();
        rustix::net::send(&sender, b"short", SendFlags::NOSIGNAL).unwrap();
        let error = reader.read(Duration::ZERO, |_| Ok(true)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        drop(reader);
        assert!(send_captured(&Probe::default(), SNAPLEN, &sender).is_err());
    }
}
