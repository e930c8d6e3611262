//! A domain's connection through its shared page (`struct xenstore_domain_interface`).

use pvio_ring::shm::SharedMemory;
use pvio_ring::{ByteRing, DomId, RingFault};
use pvio_xenbus::wire::page::{
    CONNECTED, PageError, PageWord, RECONNECT, SERVER_FEATURE_ERROR, SERVER_FEATURE_RECONNECTION,
};

use crate::buffers::{Buffers, INPUT_LIMIT, Unusable};
use crate::id::ConnId;
use crate::store::{Store, StoreError};

/// A connection of a domain to a [`Store`] through the domain's shared page, as the reference
/// serves domains. It does no I/O: the embedding program delivers events.
///
/// Call [`serve`](Self::serve) when the domain has sent an event, when the store has output for the
/// connection ([`Store::has_output`]), and once at the start. A domain that violates the protocol is
/// ignored, and finds the reason in the page (`error`), until it requests a reconnection.
#[derive(Debug)]
pub struct RingConnection<M> {
    ring: ByteRing<M>,
    domid: DomId,
    conn: ConnId,
    buffers: Buffers,
    /// Why the domain is ignored.
    error: Option<PageError>,
}

/// Result of [`RingConnection::serve`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Served {
    /// Send the domain an event.
    pub notify: bool,
    /// Work is left that can be done now: call [`RingConnection::serve`] again after the other
    /// connections.
    pub more: bool,
}

impl<M: SharedMemory> RingConnection<M> {
    /// Connects a domain, at the indices stored in its page: requests in the ring are executed.
    ///
    /// # Errors
    /// [`RingFault::Geometry`] if the memory is smaller than the interface, or read-only.
    pub fn new(store: &mut Store, domid: DomId, page: M) -> Result<Self, RingFault> {
        let ring = ByteRing::xenstore_server(page)?;
        let features = SERVER_FEATURE_RECONNECTION | SERVER_FEATURE_ERROR;
        PageWord::Error.store(ring.memory(), 0);
        PageWord::ServerFeatures.store(ring.memory(), features);
        let conn = store.connect(domid);
        Ok(Self { ring, domid, conn, buffers: Buffers::default(), error: None })
    }

    /// Returns the connection's id in the store. [`serve`](Self::serve) may change it.
    #[must_use]
    pub const fn conn(&self) -> ConnId {
        self.conn
    }

    /// Returns why the domain is ignored.
    #[must_use]
    pub const fn error(&self) -> Option<PageError> {
        self.error
    }

    /// Reads requests from the ring, executes a limited number of them, and writes responses and
    /// events as far as there is room.
    ///
    /// # Errors
    /// [`StoreError::Closed`] if the domain was released.
    pub fn serve(&mut self, store: &mut Store) -> Result<Served, StoreError> {
        // A released domain must not reconnect.
        if !store.conns.contains_key(&self.conn) {
            return Err(StoreError::Closed);
        }
        let mut served = Served::default();
        if PageWord::Connection.load(self.ring.memory()) == RECONNECT {
            self.reconnect(store);
            served.notify = true;
        }
        if self.error.is_some() {
            return Ok(served);
        }
        match self.turn(store, &mut served) {
            Ok(()) => return Ok(served),
            Err(Fault::Store(error)) => return Err(error),
            Err(Fault::Page(error)) => self.ignore(store, error),
        }
        Ok(Served { notify: true, more: false })
    }

    /// Disconnects the domain. The page is not changed.
    pub fn close(self, store: &mut Store) {
        store.disconnect(self.conn);
    }

    fn turn(&mut self, store: &mut Store, served: &mut Served) -> Result<(), Fault> {
        let mut chunk = [0_u8; INPUT_LIMIT];
        let into = chunk.get_mut(..self.buffers.room()).unwrap_or_default();
        let read = self.ring.read(into)?;
        self.buffers.received(into.get(..read).unwrap_or_default());
        let left = self.buffers.execute(self.conn, store)?;
        let mut written = 0_usize;
        loop {
            let rest = self.buffers.unsent(self.conn, store);
            let count = if rest.is_empty() { 0 } else { self.ring.write(rest)? };
            if count == 0 {
                break;
            }
            written = written.saturating_add(count);
            self.buffers.sent(count);
        }
        served.notify |= read > 0 || written > 0;
        let unread = self.buffers.room() > 0 && self.ring.readable()? > 0;
        served.more = left || unread || self.buffers.could_execute(self.conn, store);
        Ok(())
    }

    /// Drops all state of the connection and empties the rings.
    fn reconnect(&mut self, store: &mut Store) {
        self.drop_state(store);
        self.error = None;
        self.ring.reset();
        let page = self.ring.memory();
        PageWord::Error.store(page, 0);
        PageWord::Connection.store(page, CONNECTED);
    }

    fn ignore(&mut self, store: &mut Store, error: PageError) {
        self.drop_state(store);
        self.error = Some(error);
        PageWord::Error.store(self.ring.memory(), error.code());
    }

    fn drop_state(&mut self, store: &mut Store) {
        store.disconnect(self.conn);
        self.conn = store.connect(self.domid);
        self.buffers = Buffers::default();
    }
}

enum Fault {
    Page(PageError),
    Store(StoreError),
}

impl From<RingFault> for Fault {
    fn from(_: RingFault) -> Self {
        Self::Page(PageError::RingIndex)
    }
}

impl From<Unusable> for Fault {
    fn from(error: Unusable) -> Self {
        match error {
            Unusable::Frame(_) => Self::Page(PageError::Protocol),
            Unusable::Store(error) => Self::Store(error),
        }
    }
}
