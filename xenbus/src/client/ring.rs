//! A client over the shared page of a guest (`struct xenstore_domain_interface` in
//! `io/xs_wire.h`). It needs no operating system.

use alloc::format;
use alloc::vec::Vec;
use core::time::Duration;

use pvio_ring::shm::SharedMemory;
use pvio_ring::{ByteRing, RingFault};

use super::connection::Connection;
use super::transport::{SendError, Transport, Wait};
use crate::wire::Op;
use crate::wire::page::{
    CONNECTED, PageError, PageWord, RECONNECT, SERVER_FEATURE_ERROR, SERVER_FEATURE_RECONNECTION,
};
use crate::xenstore::{WatchEvent, Xenstore, XsError};

/// The event channel to the server, and the guest's clock.
pub trait RingEvents {
    /// A point in time.
    type Deadline: Copy;

    /// Returns the point in time after this duration; `None` if it is beyond the range of the clock.
    fn deadline(&self, timeout: Duration) -> Option<Self::Deadline>;

    /// Notifies the server.
    ///
    /// # Errors
    /// [`XsError::Transport`]: the event channel is not usable.
    fn notify(&mut self) -> Result<(), XsError>;

    /// Waits until an event arrives. Returns immediately if one arrived since the last call, and may
    /// return early for any reason. Returns `false` if the deadline had passed.
    ///
    /// # Errors
    /// [`XsError::Transport`]: the event channel is not usable.
    fn wait(&mut self, until: Option<Self::Deadline>) -> Result<bool, XsError>;
}

/// A connection to a xenstore server over a shared page.
///
/// If the server rejects the connection, or violates the protocol, every call returns the same
/// error until [`reconnect`](Self::reconnect).
#[derive(Debug)]
pub struct RingClient<M, E>(Connection<RingTransport<M, E>>);

impl<M: SharedMemory, E: RingEvents> RingClient<M, E> {
    /// Attaches to the page of this domain, at the indices stored in it. If an earlier user of the
    /// page, for example a boot loader, may have left requests or watches, call
    /// [`reconnect`](Self::reconnect) first.
    ///
    /// # Errors
    /// [`RingFault::Geometry`] if the memory is smaller than the interface, or read-only.
    pub fn attach(page: M, events: E) -> Result<Self, RingFault> {
        let ring = ByteRing::xenstore_client(page)?;
        Ok(Self(Connection::new(RingTransport { ring, events })))
    }

    /// Requests that the server drops all watches, transactions and messages of the connection, and
    /// waits until it has reset the rings, without a deadline: without a server it does not return.
    ///
    /// # Errors
    /// [`XsError::Server`] if the server does not support this; [`XsError::Transport`] if the event channel is not
    /// usable.
    pub fn reconnect(&mut self) -> Result<(), XsError> {
        let RingTransport { ring, events } = &mut self.0.transport;
        let page = ring.memory();
        if PageWord::ServerFeatures.load(page) & SERVER_FEATURE_RECONNECTION == 0 {
            return Err(XsError::Server("it does not support reconnection".into()));
        }
        PageWord::Connection.store(page, RECONNECT);
        events.notify()?;
        while PageWord::Connection.load(page) != CONNECTED {
            events.wait(None)?;
        }
        ring.reattach();
        self.0.reset();
        Ok(())
    }
}

impl<M: SharedMemory, E: RingEvents> Xenstore for RingClient<M, E> {
    fn request(&mut self, op: Op, tx_id: u32, parts: &[&[u8]]) -> Result<Vec<u8>, XsError> {
        self.0.request(op, tx_id, parts)
    }

    fn poll_event(&mut self) -> Result<Option<WatchEvent>, XsError> {
        self.0.poll_event()
    }

    fn wait_event(&mut self, timeout: Option<Duration>) -> Result<Option<WatchEvent>, XsError> {
        self.0.wait_event(timeout)
    }
}

#[derive(Debug)]
struct RingTransport<M, E> {
    ring: ByteRing<M>,
    events: E,
}

impl<M: SharedMemory, E: RingEvents> RingTransport<M, E> {
    /// Notifies the server of a change of an index: it waits for data or for room.
    fn moved(&mut self, bytes: Result<usize, RingFault>) -> Result<Option<usize>, XsError> {
        match bytes {
            Ok(0) => self.check_error().map(|()| None),
            Ok(n) => self.events.notify().map(|()| Some(n)),
            Err(_) => Err(XsError::Protocol("an invalid ring index")),
        }
    }

    /// Returns the error that the server has reported, if any. It ignores this domain since then.
    fn check_error(&self) -> Result<(), XsError> {
        let page = self.ring.memory();
        if PageWord::ServerFeatures.load(page) & SERVER_FEATURE_ERROR == 0 {
            return Ok(());
        }
        match PageError::from_code(PageWord::Error.load(page)) {
            Some(error) => Err(XsError::Server(format!("{error}").into())),
            None => Ok(()),
        }
    }
}

impl<M: SharedMemory, E: RingEvents> Transport for RingTransport<M, E> {
    type Deadline = E::Deadline;

    fn deadline(&self, timeout: Duration) -> Option<E::Deadline> {
        self.events.deadline(timeout)
    }

    fn send(&mut self, bytes: &[u8]) -> Result<Option<usize>, SendError> {
        let written = self.ring.write(bytes);
        Ok(self.moved(written)?)
    }

    fn receive(&mut self, into: &mut [u8]) -> Result<Option<usize>, XsError> {
        let read = self.ring.read(into);
        self.moved(read)
    }

    fn wait(&mut self, _what: Wait, until: Option<E::Deadline>) -> Result<bool, XsError> {
        self.events.wait(until)
    }
}
