//! The store: its connections, and the execution of requests.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use pvio_ring::DomId;

use crate::domain::{Domain, rights};
use crate::id::ConnId;
use crate::quota::Quota;
use crate::response;
use crate::tree::{Change, Transaction, Tree};
use crate::watch::{EventQueue, Watches};
use pvio_xenbus::wire::{Access, HEADER_LEN, Header, Op, Perm, XsErrno, parent};

/// Why a request was not accepted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StoreError {
    /// The connection is gone, for example because its domain was released.
    #[error("the connection is closed")]
    Closed,
    /// The number of responses not taken has reached [`Quota::outstanding`]: take the output first.
    #[error("too many responses wait to be taken")]
    Backpressure,
}

#[derive(Debug)]
pub(crate) struct Conn {
    pub(crate) domid: DomId,
    pub(crate) transactions: BTreeMap<u32, Transaction>,
    pub(crate) last_tx: u32,
    /// The connection's watches, each a path and a token.
    pub(crate) watches: BTreeSet<(Box<str>, Box<[u8]>)>,
    pub(crate) events: EventQueue,
    /// Complete responses, with headers.
    pub(crate) responses: Vec<u8>,
    pub(crate) response_count: usize,
}

/// The store and its connections.
#[derive(Debug)]
pub struct Store {
    pub(crate) tree: Tree,
    pub(crate) quota: Quota,
    pub(crate) conns: BTreeMap<ConnId, Conn>,
    pub(crate) domains: BTreeMap<DomId, Domain>,
    pub(crate) watches: Watches,
    /// Permissions of `@introduceDomain` and of `@releaseDomain`: who gets their events.
    pub(crate) introduce_perms: Arc<[Perm]>,
    pub(crate) release_perms: Arc<[Perm]>,
    pub(crate) last_conn: u64,
    /// Connections that the store dropped, for the embedding program to close.
    pub(crate) dropped: Vec<ConnId>,
}

impl Default for Store {
    fn default() -> Self {
        Self::new(Quota::default())
    }
}

impl Store {
    /// Creates a store with the root node and `/tool/xenstored`, as the reference starts.
    #[must_use]
    pub fn new(quota: Quota) -> Self {
        let dom0_only: Arc<[Perm]> = Arc::new([Perm::new(DomId::DOM0, Access::None)]);
        let mut store = Self {
            tree: Tree::new(),
            quota,
            conns: BTreeMap::new(),
            domains: BTreeMap::new(),
            watches: Watches::default(),
            introduce_perms: Arc::clone(&dom0_only),
            release_perms: dom0_only,
            last_conn: 0,
            dropped: Vec::new(),
        };
        store.domains.entry(DomId::DOM0).or_default().introduced = true;
        let setup = store.connect(DomId::DOM0);
        let _ = store.execute(setup, Op::Mkdir, 0, b"/tool/xenstored\0");
        store.disconnect(setup);
        store
    }

    /// Returns the quotas.
    #[must_use]
    pub const fn quota(&self) -> &Quota {
        &self.quota
    }

    /// Connects a domain. Its relative paths are below `/local/domain/<domid>`; dom0's connections
    /// are privileged.
    pub fn connect(&mut self, domid: DomId) -> ConnId {
        self.last_conn = self.last_conn.wrapping_add(1);
        let id = ConnId(self.last_conn);
        let conn = Conn {
            domid,
            transactions: BTreeMap::new(),
            last_tx: 0,
            watches: BTreeSet::new(),
            events: EventQueue::default(),
            responses: Vec::new(),
            response_count: 0,
        };
        self.conns.insert(id, conn);
        self.domains.entry(domid).or_default();
        id
    }

    /// Removes a connection with its watches, transactions and output. Nodes are not removed.
    pub fn disconnect(&mut self, conn: ConnId) {
        self.reset(conn);
        if let Some(c) = self.conns.remove(&conn) {
            self.forget_idle_domain(c.domid);
        }
    }

    /// Returns whether the connection exists and a request would be accepted.
    #[must_use]
    pub fn can_accept(&self, conn: ConnId) -> bool {
        self.conns.get(&conn).is_some_and(|c| c.response_count < self.quota.outstanding)
    }

    /// Executes one request and queues its response. The payload should be `header.len` bytes long;
    /// the length of the slice is the one used.
    ///
    /// # Errors
    /// [`StoreError`]; a request rejected by the protocol gets a response and is not an error.
    pub fn handle(
        &mut self,
        conn: ConnId,
        header: &Header,
        payload: &[u8],
    ) -> Result<(), StoreError> {
        let c = self.conns.get(&conn).ok_or(StoreError::Closed)?;
        if c.response_count >= self.quota.outstanding {
            return Err(StoreError::Backpressure);
        }
        let result = match header.op() {
            Some(op) => self.execute(conn, op, header.tx_id, payload),
            None => Err(XsErrno::NoSys),
        };
        let Some(c) = self.conns.get_mut(&conn) else {
            return Err(StoreError::Closed);
        };
        let (kind, body) = match result {
            Ok(body) => (header.kind, body),
            Err(errno) => (Op::Error.code(), response::text(errno.name())),
        };
        push_frame(&mut c.responses, kind, header.req_id, header.tx_id, |out| {
            out.extend_from_slice(&body)
        });
        c.response_count = c.response_count.saturating_add(1);
        Ok(())
    }

    /// Returns whether [`Store::take_output`] would append anything.
    #[must_use]
    pub fn has_output(&self, conn: ConnId) -> bool {
        self.conns.get(&conn).is_some_and(|c| !c.responses.is_empty() || !c.events.is_empty())
    }

    /// Appends a connection's output to `out`: all its responses (at most [`Quota::outstanding`]
    /// messages), then events while `out` is shorter than `limit` bytes.
    pub fn take_output(&mut self, conn: ConnId, out: &mut Vec<u8>, limit: usize) {
        let Some(c) = self.conns.get_mut(&conn) else {
            return;
        };
        out.append(&mut c.responses);
        c.response_count = 0;
        while out.len() < limit {
            let Some(event) = c.events.pop() else { break };
            push_frame(out, Op::WatchEvent.code(), 0, 0, |out| event.emit(out));
        }
    }

    /// Returns the connections that were dropped since the last call because their domain was
    /// released.
    pub fn take_dropped(&mut self) -> Vec<ConnId> {
        core::mem::take(&mut self.dropped)
    }

    /// Returns the number of connections.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.conns.len()
    }

    /// Returns the number of connections of a domain.
    #[must_use]
    pub fn connections_of(&self, domid: DomId) -> usize {
        self.conns.values().filter(|c| c.domid == domid).count()
    }

    /// Checks that the tree is consistent, that the counts of owned nodes are right, and that every watch
    /// belongs to a connection that lists it.
    ///
    /// # Errors
    /// The first inconsistent path; that would be a bug of this crate.
    pub fn check(&self) -> Result<(), String> {
        self.tree.check()?;
        let mut listed = 0_usize;
        for (path, watch) in self.watches.iter() {
            let owner = self.conns.get(&watch.conn);
            let entry = (Box::from(path), watch.token.clone());
            if !owner.is_some_and(|c| c.watches.contains(&entry)) {
                return Err(alloc::format!("a watch on {path} belongs to no connection"));
            }
            listed = listed.saturating_add(1);
        }
        let held = self.conns.values().map(|c| c.watches.len()).sum::<usize>();
        if held == listed { Ok(()) } else { Err("a watch of a connection is not indexed".into()) }
    }

    pub(crate) fn is_privileged(&self, conn: ConnId) -> bool {
        self.conns.get(&conn).is_some_and(|c| c.domid == DomId::DOM0)
    }

    /// Sends changes to every watch that they concern, if its domain has read permission.
    pub(crate) fn fire(&mut self, changes: &[Change]) {
        for change in changes {
            let now = |path: &str| self.tree.get(path).map(|n| Arc::clone(&n.perms));
            let sights = [
                change.node_perms.clone(),
                change.parent_perms.clone(),
                now(&change.path),
                parent(&change.path).and_then(now),
            ];
            for (watched, watch) in self.watches.concerned(&change.path, change.exact) {
                let Some(c) = self.conns.get_mut(&watch.conn) else {
                    continue;
                };
                let target = self.domains.get(&c.domid).and_then(|d| d.target);
                let sees = |perms: &Option<Arc<[Perm]>>| {
                    perms.as_deref().is_some_and(|p| rights(c.domid, target, p).read)
                };
                if sights.iter().any(sees) {
                    let (path, watched) = (watch.show(&change.path), watch.show(watched));
                    c.events.push(path, watched, &watch.token, self.quota.events);
                }
            }
        }
    }
}

fn push_frame(
    out: &mut Vec<u8>,
    kind: u32,
    req_id: u32,
    tx_id: u32,
    body: impl FnOnce(&mut Vec<u8>),
) {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER_LEN]);
    body(out);
    let len = out.len().saturating_sub(start).saturating_sub(HEADER_LEN);
    // The size of bodies is limited to 4096 bytes where they are built.
    let header = Header { kind, req_id, tx_id, len: u32::try_from(len).unwrap_or(u32::MAX) };
    if let Some(place) = out.get_mut(start..).and_then(|tail| tail.first_chunk_mut::<HEADER_LEN>())
    {
        *place = header.emit();
    }
}
