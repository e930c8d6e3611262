//! Messages between the supervisor and its processes.
//!
//! A message is one packet of a `SOCK_SEQPACKET` socket: JSON, with file descriptors beside it
//! (`SCM_RIGHTS`). A reader ignores fields that it does not know, so that two versions of pvio can
//! talk to each other during an upgrade.

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_passcred;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};
use rustix::process::Pid;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Maximum size of a message in bytes.
pub const MAX_MESSAGE: usize = 64 << 10;
/// Maximum number of descriptors in a message; the kernel's own limit is 253.
pub const MAX_DESCRIPTORS: usize = 64;

/// The reason why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The other process has closed the socket, or has died.
    #[error("the other process has closed the connection")]
    Closed,
    /// The other process does not read its messages.
    #[error("the other process does not read its messages")]
    Full,
    /// The message is longer than [`MAX_MESSAGE`], or has more than [`MAX_DESCRIPTORS`].
    #[error("a message is too long")]
    TooLong,
    /// The message is not what this version of pvio understands.
    #[error("a message cannot be parsed")]
    Invalid(#[source] serde_json::Error),
    /// The system's error.
    #[error("the connection to the other process failed")]
    Io(#[source] io::Error),
}

impl From<Errno> for ChannelError {
    fn from(error: Errno) -> Self {
        match error {
            Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN => Self::Closed,
            Errno::AGAIN | Errno::NOBUFS => Self::Full,
            Errno::MSGSIZE => Self::TooLong,
            other => Self::Io(other.into()),
        }
    }
}

/// A message, and what came with it.
#[derive(Debug)]
pub struct Received<T> {
    /// The message.
    pub message: T,
    /// The descriptors.
    pub descriptors: Vec<OwnedFd>,
    /// The process that sent it, if the kernel was [told](Channel::ask_for_sender) to add it.
    pub sender: Option<Pid>,
}

/// One end of the connection between two processes. Sending and receiving never block.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// Creates both ends of a connection.
    ///
    /// # Errors
    /// The system is out of file descriptors.
    pub fn pair() -> io::Result<(Self, Self)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Self(one), Self(other)))
    }

    /// Uses a connected socket, which must not block.
    #[must_use]
    pub const fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Returns the socket.
    #[must_use]
    pub fn into_socket(self) -> OwnedFd {
        self.0
    }

    /// Sends a message.
    ///
    /// # Errors
    /// A [`ChannelError`]; nothing was sent.
    pub fn send<T: Serialize>(
        &self,
        message: &T,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let bytes = serde_json::to_vec(message).map_err(ChannelError::Invalid)?;
        if bytes.len() > MAX_MESSAGE || descriptors.len() > MAX_DESCRIPTORS {
            return Err(ChannelError::TooLong);
        }
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(ChannelError::TooLong);
        }
        // Without NOSIGNAL, a peer that died would end this process with SIGPIPE.
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let data = [IoSlice::new(&bytes)];
        loop {
            match sendmsg(&self.0, &data, &mut control, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Receives a message; `None` if there is none now.
    ///
    /// # Errors
    /// A [`ChannelError`]. After [`ChannelError::Invalid`] and [`ChannelError::TooLong`], the
    /// message is lost, and its descriptors are closed.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>, ChannelError> {
        Ok(self.receive_from()?.map(|received| (received.message, received.descriptors)))
    }

    /// Receives a message as [`receive`](Self::receive), and the process that sent it.
    ///
    /// # Errors
    /// As [`receive`](Self::receive).
    pub fn receive_from<T: DeserializeOwned>(&self) -> Result<Option<Received<T>>, ChannelError> {
        let mut bytes = vec![0; MAX_MESSAGE];
        let mut space =
            [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_DESCRIPTORS), ScmCredentials(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = loop {
            let mut data = [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.0, &mut data, &mut control, flags) {
                Ok(received) => break received,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        };
        let (mut descriptors, mut sender) = (Vec::new(), None);
        for message in control.drain() {
            match message {
                RecvAncillaryMessage::ScmRights(rights) => descriptors.extend(rights),
                RecvAncillaryMessage::ScmCredentials(credentials) => sender = Some(credentials.pid),
                _ => {}
            }
        }
        if received.bytes == 0 {
            return Err(ChannelError::Closed);
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(ChannelError::TooLong);
        }
        let message = serde_json::from_slice(&bytes[..received.bytes]);
        let received = message.map(|message| Some(Received { message, descriptors, sender }));
        received.map_err(ChannelError::Invalid)
    }

    /// Lets the kernel name the sender of each message that arrives from now on.
    ///
    /// # Errors
    /// The system's error.
    pub fn ask_for_sender(&self) -> io::Result<()> {
        Ok(set_socket_passcred(&self.0, true)?)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    #[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
    enum Message {
        Number { value: u64 },
        Text(String),
    }

    #[test]
    fn message_and_descriptors_arrive_together() {
        let (one, other) = Channel::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"content").unwrap();
        assert!(other.receive::<Message>().unwrap().is_none());
        one.send(&Message::Number { value: u64::MAX }, &[file.as_fd(), one.as_fd()]).unwrap();
        let (message, descriptors) = other.receive::<Message>().unwrap().unwrap();
        assert_eq!(message, Message::Number { value: u64::MAX });
        let [received, _] = <[OwnedFd; 2]>::try_from(descriptors).unwrap();
        let mut received = File::from(received);
        received.rewind().unwrap();
        let mut text = String::new();
        received.read_to_string(&mut text).unwrap();
        assert_eq!(text, "content");
    }

    #[test]
    fn closed_peer_is_reported_to_both_directions() {
        let (one, other) = Channel::pair().unwrap();
        drop(other);
        let text = Message::Text("lost".into());
        assert!(matches!(one.send(&text, &[]), Err(ChannelError::Closed)));
        assert!(matches!(one.receive::<Message>(), Err(ChannelError::Closed)));
    }

    #[test]
    fn peer_that_does_not_read_is_reported_without_blocking() {
        let (one, _other) = Channel::pair().unwrap();
        let text = Message::Text("x".repeat(MAX_MESSAGE / 2));
        let sent = (0..1000).find_map(|_| one.send(&text, &[]).err()).unwrap();
        assert!(matches!(sent, ChannelError::Full), "{sent:?}");
    }

    #[test]
    fn message_beyond_limit_is_rejected_by_sender_and_reader() {
        let (one, other) = Channel::pair().unwrap();
        let long = Message::Text("x".repeat(MAX_MESSAGE));
        assert!(matches!(one.send(&long, &[]), Err(ChannelError::TooLong)));
        let many = vec![one.as_fd(); MAX_DESCRIPTORS + 1];
        let short = Message::Number { value: 1 };
        assert!(matches!(one.send(&short, &many), Err(ChannelError::TooLong)));
        // A process that was taken over does not keep to the limits.
        rustix::net::send(&one, &vec![b'x'; MAX_MESSAGE + 1], SendFlags::empty()).unwrap();
        assert!(matches!(other.receive::<Message>(), Err(ChannelError::TooLong)));
        one.send(&short, &[]).unwrap();
        assert_eq!(other.receive::<Message>().unwrap().unwrap().0, short);
    }

    #[test]
    fn unknown_message_is_rejected_and_its_descriptors_are_closed() {
        let (one, other) = Channel::pair().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        one.send(&serde_json::json!({ "Unknown": 1 }), &[writer.as_fd()]).unwrap();
        drop(writer);
        assert!(matches!(other.receive::<Message>(), Err(ChannelError::Invalid(_))));
        assert_eq!(rustix::io::read(&reader, &mut [0; 1]).unwrap(), 0, "the pipe has no writer");
    }

    #[test]
    fn field_of_later_version_is_ignored() {
        let (one, other) = Channel::pair().unwrap();
        one.send(&serde_json::json!({ "Number": { "value": 3, "new": true } }), &[]).unwrap();
        let (message, _) = other.receive::<Message>().unwrap().unwrap();
        assert_eq!(message, Message::Number { value: 3 });
    }
}
