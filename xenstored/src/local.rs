use alloc::rc::Rc;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::time::Duration;

use pvio_ring::DomId;

use crate::id::ConnId;
use crate::store::Store;
use pvio_xenbus::wire::Op;
use pvio_xenbus::{WatchEvent, Xenstore, XsError, concat_payload};

/// A connection to a [`Store`] in the same thread, for a simulator: requests are function calls.
///
/// Dropping it disconnects. After [`Store::release`] of its domain every call is
/// [`XsError::Closed`].
#[derive(Debug)]
pub struct LocalClient {
    store: Rc<RefCell<Store>>,
    conn: ConnId,
}

impl LocalClient {
    /// Connects a domain.
    #[must_use]
    pub fn connect(store: &Rc<RefCell<Store>>, domid: DomId) -> Self {
        let conn = store.borrow_mut().connect(domid);
        Self { store: Rc::clone(store), conn }
    }

    /// Returns the connection's id in the store.
    #[must_use]
    pub const fn conn(&self) -> ConnId {
        self.conn
    }
}

impl Xenstore for LocalClient {
    fn request(&mut self, op: Op, tx_id: u32, parts: &[&[u8]]) -> Result<Vec<u8>, XsError> {
        let payload = concat_payload(parts)?;
        let mut store = self.store.borrow_mut();
        if !store.conns.contains_key(&self.conn) {
            return Err(XsError::Closed);
        }
        store
            .execute(self.conn, op, tx_id, &payload)
            .map_err(|errno| XsError::refused(op, parts, errno))
    }

    fn poll_event(&mut self) -> Result<Option<WatchEvent>, XsError> {
        let mut store = self.store.borrow_mut();
        let conn = store.conns.get_mut(&self.conn).ok_or(XsError::Closed)?;
        Ok(conn.events.pop().map(|event| {
            let (path, token) = event.text();
            WatchEvent { path, token }
        }))
    }

    /// Same as [`Xenstore::poll_event`]: no event can occur while the only thread waits.
    fn wait_event(&mut self, _timeout: Option<Duration>) -> Result<Option<WatchEvent>, XsError> {
        self.poll_event()
    }
}

impl Drop for LocalClient {
    fn drop(&mut self) {
        if let Ok(mut store) = self.store.try_borrow_mut() {
            store.disconnect(self.conn);
        }
    }
}
