//! The device process's connection to its supervisor, and to the next one.

use crate::failure::Failure;
use crate::process::channel::{Channel, ChannelError};
use crate::process::messages::{Descriptor, FromDevice, ToDevice, VERSION};
use crate::process::registry::accept;
use crate::stop::{Wakeup, sleep};
use pvio_ring::error::Report;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// How long the supervisor may take to send what the session needs.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// The descriptors of a session, each with its purpose.
pub type Descriptors = Vec<(Descriptor, OwnedFd)>;

/// What a supervisor sent.
#[derive(Debug, PartialEq, Eq)]
pub enum Received<C> {
    /// A change of settings.
    Change(C),
    /// The session is to be left to a successor.
    Stop,
    /// Another supervisor has connected. It knows nothing of what the earlier one was told.
    NewSupervisor,
}

/// The connection to the supervisor. While there is none, the session goes on, and the next
/// supervisor is awaited.
#[derive(Debug)]
pub struct Control {
    channel: Option<Channel>,
    listen: Option<OwnedFd>,
    /// The descriptors beside the last change.
    descriptors: Vec<OwnedFd>,
}

impl Control {
    /// Receives what the session needs.
    ///
    /// # Errors
    /// The supervisor has ended, or speaks another version of the protocol.
    pub fn begin<S, C, I>(channel: Channel) -> Result<(Self, S, Descriptors), Failure>
    where
        S: DeserializeOwned,
        C: DeserializeOwned,
        I: Serialize,
    {
        let failed = |error: ChannelError| Failure::foreign(error);
        channel
            .send(&FromDevice::<I>::Hello { version: VERSION, session: None }, &[])
            .map_err(failed)?;
        let (mut found, mut listen) = (Vec::new(), None);
        loop {
            let message = crate::process::child::wait_message(&channel, START_TIMEOUT);
            let (message, descriptors) = message.map_err(failed)?;
            match message {
                ToDevice::<S, C>::Descriptors(purposes) => {
                    if purposes.len() != descriptors.len() {
                        return Err(Failure::new("the supervisor sent other descriptors", ""));
                    }
                    for (purpose, descriptor) in purposes.into_iter().zip(descriptors) {
                        match purpose {
                            Descriptor::Listen => listen = Some(descriptor),
                            other => found.push((other, descriptor)),
                        }
                    }
                }
                ToDevice::Serve(serve) => {
                    let channel = Some(channel);
                    let this = Self { channel, listen, descriptors: Vec::new() };
                    return Ok((this, *serve, found));
                }
                ToDevice::Change(_) => {}
                ToDevice::Stop => return Err(Failure::new("stopped before it served", "")),
            }
        }
    }

    /// Tells a new supervisor which session this is; `None` if it cannot go on with that.
    pub fn hello<I: Serialize>(&mut self, session: Option<I>, descriptors: &[BorrowedFd<'_>]) {
        let session = session.map(Box::new);
        self.send_with(&FromDevice::Hello { version: VERSION, session }, descriptors);
    }

    /// Sends a message to the supervisor; it is lost if there is none.
    pub fn send<I: Serialize>(&mut self, message: &FromDevice<I>) {
        self.send_with(message, &[]);
    }

    fn send_with<I: Serialize>(&mut self, message: &FromDevice<I>, fds: &[BorrowedFd<'_>]) {
        let Some(channel) = &self.channel else { return };
        match channel.send(message, fds) {
            Ok(()) | Err(ChannelError::TooLong | ChannelError::Invalid(_)) => {}
            // A supervisor that does not read is replaced as one that has ended.
            Err(ChannelError::Closed | ChannelError::Full | ChannelError::Io(_)) => {
                self.channel = None;
            }
        }
    }

    /// Takes the descriptors beside the change that was received last.
    pub fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.descriptors)
    }

    /// Returns the next message, if there is one.
    pub fn receive<S, C>(&mut self) -> Option<Received<C>>
    where
        S: DeserializeOwned,
        C: DeserializeOwned,
    {
        if let Some(listen) = &self.listen {
            match accept(listen) {
                // Only a process of root can reach the socket: its directory is private.
                Ok(Some(channel)) => {
                    self.channel = Some(channel);
                    return Some(Received::NewSupervisor);
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "a supervisor cannot connect"),
            }
        }
        loop {
            let received = self.channel.as_ref()?.receive::<ToDevice<S, C>>();
            match received {
                Ok(None) => return None,
                Ok(Some((ToDevice::Change(change), descriptors))) => {
                    self.descriptors = descriptors;
                    return Some(Received::Change(change));
                }
                Ok(Some((ToDevice::Stop, _))) => return Some(Received::Stop),
                // They belong to the start.
                Ok(Some((ToDevice::Serve(_) | ToDevice::Descriptors(_), _))) => {}
                Err(error @ (ChannelError::Invalid(_) | ChannelError::TooLong)) => {
                    // A later version may know more.
                    tracing::warn!(error = %Report(&error), "a message of the supervisor is ignored");
                }
                Err(error) => {
                    if !matches!(error, ChannelError::Closed) {
                        tracing::warn!(error = %Report(&error), "the connection to the supervisor failed");
                    }
                    self.channel = None;
                    tracing::info!("serving without a supervisor until the next one connects");
                }
            }
        }
    }

    /// Waits for a message, a supervisor, or the wake-up.
    ///
    /// # Errors
    /// The system's error.
    pub fn wait(&self, wakeup: &Wakeup) -> Result<(), Failure> {
        self.wait_also_for(wakeup, None)
    }

    /// Waits as [`wait`](Self::wait), also until another descriptor is readable.
    ///
    /// # Errors
    /// The system's error.
    pub fn wait_also_for(
        &self,
        wakeup: &Wakeup,
        other: Option<BorrowedFd<'_>>,
    ) -> Result<(), Failure> {
        let mut events = vec![wakeup.as_fd()];
        events.extend(other);
        events.extend(self.channel.as_ref().map(AsFd::as_fd));
        events.extend(self.listen.as_ref().map(AsFd::as_fd));
        sleep(&events, None)?;
        wakeup.take();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::registry::Registry;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
    struct Payload(u32);

    type To = ToDevice<Payload, Payload>;
    type From = FromDevice<Payload>;

    #[test]
    fn session_survives_supervisor_and_hears_next_one() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(&dir.path().join("devices")).unwrap();
        let listen = registry.listen("vbd-1-51712").unwrap();
        let (supervisor, channel) = Channel::pair().unwrap();
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        let purposes = vec![Descriptor::Listen, Descriptor::Record];
        let descriptors = [listen.as_fd(), reader.as_fd()];
        supervisor.send(&To::Descriptors(purposes), &descriptors).unwrap();
        supervisor.send(&To::Serve(Box::new(Payload(1))), &[]).unwrap();
        let (mut control, serve, found) =
            Control::begin::<Payload, Payload, Payload>(channel).unwrap();
        assert_eq!((serve, found.len()), (Payload(1), 1));
        drop(supervisor);
        assert_eq!(control.receive::<Payload, Payload>(), None);
        control.send::<Payload>(&From::Ready);
        let next = registry.processes().unwrap().remove("vbd-1-51712").unwrap();
        assert_eq!(control.receive::<Payload, Payload>(), Some(Received::NewSupervisor));
        control.send::<Payload>(&From::FlushFailed);
        assert_eq!(next.receive::<From>().unwrap().unwrap().0, From::FlushFailed);
        next.send(&To::Change(Payload(2)), &[]).unwrap();
        next.send(&To::Stop, &[]).unwrap();
        assert_eq!(control.receive::<Payload, Payload>(), Some(Received::Change(Payload(2))));
        assert_eq!(control.receive::<Payload, Payload>(), Some(Received::Stop));
    }
}
