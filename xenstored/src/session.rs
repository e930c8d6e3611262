//! State of a connection: watches and transactions.

use alloc::boxed::Box;
use alloc::string::ToString;

use pvio_ring::DomId;

use crate::id::ConnId;
use crate::response::{Response, ok, text};
use crate::store::Store;
use crate::tree::Transaction;
use crate::watch::Watch;
use pvio_xenbus::wire::{WirePath, XsErrno, parse_u32, strings};

/// Memory that counts for a watch, besides its path and token, in bytes.
const WATCH_OVERHEAD: usize = 128;
/// Memory that counts for an empty transaction, in bytes.
const TRANSACTION_OVERHEAD: usize = 256;

impl Store {
    pub(crate) fn watch(&mut self, conn: ConnId, payload: &[u8]) -> Response {
        let mut args = strings(payload);
        let (path, token) = args.next().zip(args.next()).ok_or(XsErrno::Inval)?;
        let depth = match args.next() {
            None | Some(b"") => None,
            Some(text) => Some(parse_u32(text).ok_or(XsErrno::Inval)?),
        };
        let (path, strip) = self.watch_path(conn, path)?;
        if self.watches.contains(&path, conn, token) {
            return Err(XsErrno::Exist);
        }
        let domid = self.conns.get(&conn).ok_or(XsErrno::Io)?.domid;
        if domid != DomId::DOM0 {
            let held = self.domains.get(&domid).map_or(0, |d| d.watches);
            if held >= self.quota.watches {
                return Err(XsErrno::TooBig);
            }
            if watch_cost(&path, token) > self.memory_left(domid) {
                return Err(XsErrno::NoMem);
            }
        }
        self.account_watch(domid, &path, token, true);
        let watch = Watch { conn, token: token.into(), depth, strip };
        if let Some(c) = self.conns.get_mut(&conn) {
            c.watches.insert((path.clone(), token.into()));
            // The first event fires immediately, so that a client need not read the node before it
            // watches it.
            let shown = watch.show(&path);
            c.events.push(shown, shown, token, self.quota.events);
        }
        self.watches.add(&path, watch);
        Ok(ok())
    }

    pub(crate) fn unwatch(&mut self, conn: ConnId, payload: &[u8]) -> Response {
        let mut args = strings(payload);
        let (path, token) = args.next().zip(args.next()).ok_or(XsErrno::Inval)?;
        // There can be no watch on an invalid path.
        let (path, _) = self.watch_path(conn, path).map_err(|_| XsErrno::NoEnt)?;
        if !self.watches.remove(&path, conn, token) {
            return Err(XsErrno::NoEnt);
        }
        if let Some(c) = self.conns.get_mut(&conn) {
            c.watches.remove(&(path.clone(), token.into()));
            let domid = c.domid;
            self.account_watch(domid, &path, token, false);
        }
        Ok(ok())
    }

    pub(crate) fn transaction_start(&mut self, conn: ConnId, tx_id: u32) -> Response {
        if tx_id != 0 {
            return Err(XsErrno::Busy);
        }
        let domid = self.conns.get(&conn).ok_or(XsErrno::Io)?.domid;
        if domid != DomId::DOM0 {
            let open: usize = self
                .conns
                .values()
                .filter(|c| c.domid == domid)
                .map(|c| c.transactions.len())
                .sum();
            if open >= self.quota.transactions {
                return Err(XsErrno::NoSpc);
            }
            if TRANSACTION_OVERHEAD > self.memory_left(domid) {
                return Err(XsErrno::NoMem);
            }
        }
        let c = self.conns.get_mut(&conn).ok_or(XsErrno::Io)?;
        loop {
            c.last_tx = c.last_tx.wrapping_add(1);
            if c.last_tx != 0 && !c.transactions.contains_key(&c.last_tx) {
                break;
            }
        }
        let mut tx = Transaction::default();
        tx.bytes = TRANSACTION_OVERHEAD;
        c.transactions.insert(c.last_tx, tx);
        Ok(text(&c.last_tx.to_string()))
    }

    pub(crate) fn transaction_end(&mut self, conn: ConnId, tx_id: u32, payload: &[u8]) -> Response {
        let commit = match payload {
            b"T\0" => true,
            b"F\0" => false,
            _ => return Err(XsErrno::Inval),
        };
        let c = self.conns.get_mut(&conn).ok_or(XsErrno::Io)?;
        let domid = c.domid;
        let tx = c.transactions.remove(&tx_id).ok_or(XsErrno::NoEnt)?;
        if commit {
            let max_nodes = (domid != DomId::DOM0).then_some(self.quota.nodes);
            let changes = tx.commit(&mut self.tree, domid, max_nodes)?;
            self.fire(&changes);
        }
        Ok(ok())
    }

    /// Removes a connection's watches, transactions and queued events.
    pub(crate) fn reset(&mut self, conn: ConnId) {
        let Some(c) = self.conns.get_mut(&conn) else {
            return;
        };
        let domid = c.domid;
        c.transactions.clear();
        c.events.clear();
        for (path, token) in core::mem::take(&mut c.watches) {
            self.watches.remove(&path, conn, &token);
            self.account_watch(domid, &path, &token, false);
        }
    }

    /// Returns the absolute form of a path to watch, and the length of the prefix that the client
    /// omits.
    fn watch_path(&self, conn: ConnId, path: &[u8]) -> Result<(Box<str>, usize), XsErrno> {
        match WirePath::parse(path).map_err(|_| XsErrno::Inval)? {
            WirePath::Special(p) => Ok((p.into(), 0)),
            WirePath::Absolute(p) => Ok((p.into(), 0)),
            WirePath::Relative(p) => {
                let full = self.absolute(conn, path)?;
                let strip = full.len().saturating_sub(p.len());
                Ok((full, strip))
            }
        }
    }

    fn account_watch(&mut self, domid: DomId, path: &str, token: &[u8], add: bool) {
        let Some(d) = self.domains.get_mut(&domid) else {
            return;
        };
        let cost = watch_cost(path, token);
        if add {
            d.watches = d.watches.saturating_add(1);
            d.watch_bytes = d.watch_bytes.saturating_add(cost);
        } else {
            d.watches = d.watches.saturating_sub(1);
            d.watch_bytes = d.watch_bytes.saturating_sub(cost);
        }
    }
}

fn watch_cost(path: &str, token: &[u8]) -> usize {
    path.len().saturating_add(token.len()).saturating_add(WATCH_OVERHEAD)
}
