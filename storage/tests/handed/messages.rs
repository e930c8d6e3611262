//! Messages with descriptors between the test and the confined process.

use pvio_storage::image::{Disk, DiskDescription, HandedRecord};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// What a process is to serve.
#[derive(Serialize, Deserialize)]
pub struct Job {
    pub disk: Disk,
    pub named: Vec<HandedRecord>,
    pub description: DiskDescription,
}

pub fn send(mut to: &UnixStream, message: &impl Serialize) {
    let text = serde_json::to_vec(message).unwrap();
    to.write_all(&(text.len() as u32).to_be_bytes()).unwrap();
    to.write_all(&text).unwrap();
}

pub fn receive<T: DeserializeOwned>(mut from: &UnixStream) -> T {
    let mut len = [0; 4];
    from.read_exact(&mut len).unwrap();
    let mut text = vec![0; u32::from_be_bytes(len) as usize];
    from.read_exact(&mut text).unwrap();
    serde_json::from_slice(&text).unwrap()
}

pub fn send_descriptor(to: &UnixStream, fd: BorrowedFd<'_>) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(to, &[IoSlice::new(b"d")], &mut control, SendFlags::empty()).unwrap();
}

pub fn receive_descriptor(from: &UnixStream) -> OwnedFd {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut bytes = [IoSliceMut::new(&mut byte)];
    recvmsg(from, &mut bytes, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let mut found = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    found.next().expect("a message without a descriptor")
}
