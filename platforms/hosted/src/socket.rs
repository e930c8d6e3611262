//! Packets with descriptors over Unix sockets.

use core::mem::MaybeUninit;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Largest number of descriptors of one packet.
pub(crate) const MAX_FDS: usize = 3;

/// Sends one packet completely.
pub(crate) fn send(to: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::TOOBIG);
    }
    let data = [IoSlice::new(bytes)];
    let sent =
        rustix::io::retry_on_intr(|| sendmsg(&to, &data, &mut control, SendFlags::NOSIGNAL))?;
    if sent == bytes.len() { Ok(()) } else { Err(Errno::MSGSIZE) }
}

/// Receives one packet and its descriptors. Returns 0 bytes if the peer has closed the connection.
/// A packet larger than `bytes`, or with more descriptors than `fds` permits, is an error.
pub(crate) fn recv(
    from: impl AsFd,
    bytes: &mut [u8],
    fds: Option<&mut Vec<OwnedFd>>,
) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    // Without space for descriptors, the kernel closes received ones and sets a flag.
    let room = if fds.is_some() { space.len() } else { 0 };
    let mut control = RecvAncillaryBuffer::new(&mut space[..room]);
    let mut data = [IoSliceMut::new(bytes)];
    let got = rustix::io::retry_on_intr(|| {
        recvmsg(&from, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    if let Some(fds) = fds {
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
    }
    if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(Errno::MSGSIZE);
    }
    Ok(got.bytes)
}
