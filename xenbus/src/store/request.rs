//! One request in, one answer's payload out.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use pvio_ring::DomId;

use super::nodes::{Caller, Need};
use super::tree::{Transaction, View, ViewLimits};
use super::watch::Watch;
use super::{ConnId, Store};
use crate::wire::{
    ABS_PATH_MAX, Op, PAYLOAD_MAX, Perm, WirePath, XsErrno, parse_u16, parse_u32, parse_u64,
    split_string, strings,
};

type Answer = Result<Vec<u8>, XsErrno>;

/// What a watch costs beside its path and token, in bytes.
const WATCH_OVERHEAD: usize = 128;
/// What an empty transaction costs, in bytes.
const TRANSACTION_OVERHEAD: usize = 256;

pub(super) fn error_body(errno: XsErrno) -> Vec<u8> {
    text(errno.name())
}

impl Store {
    /// Does one request and returns its answer's payload, at most 4096 bytes.
    pub(super) fn execute(&mut self, conn: ConnId, op: Op, tx_id: u32, payload: &[u8]) -> Answer {
        if payload.len() > PAYLOAD_MAX {
            return Err(XsErrno::Inval);
        }
        // What only a server sends, and what came after the release this one follows.
        if matches!(
            op,
            Op::WatchEvent
                | Op::Error
                | Op::GetFeature
                | Op::SetFeature
                | Op::GetQuota
                | Op::SetQuota
        ) {
            return Err(XsErrno::NoSys);
        }
        let privileged_only = matches!(
            op,
            Op::Control
                | Op::Introduce
                | Op::Release
                | Op::IsDomainIntroduced
                | Op::Resume
                | Op::SetTarget
        );
        if privileged_only && !self.is_privileged(conn) {
            return Err(XsErrno::Acces);
        }
        // Watches do not belong to transactions: their transaction number is ignored.
        let ignores_tx = matches!(op, Op::Watch | Op::Unwatch);
        if tx_id != 0 && !ignores_tx {
            let open = self
                .conns
                .get(&conn)
                .is_some_and(|c| c.transactions.contains_key(&tx_id));
            if !open {
                return Err(XsErrno::NoEnt);
            }
        }
        let answer = match op {
            Op::Read
            | Op::Write
            | Op::Mkdir
            | Op::Rm
            | Op::GetPerms
            | Op::Directory
            | Op::DirectoryPart => self.node_request(conn, op, tx_id, payload),
            Op::SetPerms => self.set_perms(conn, tx_id, payload),
            Op::Watch => self.watch(conn, payload),
            Op::Unwatch => self.unwatch(conn, payload),
            Op::ResetWatches => {
                self.reset(conn);
                Ok(ok())
            }
            Op::TransactionStart => self.transaction_start(conn, tx_id),
            Op::TransactionEnd => self.transaction_end(conn, tx_id, payload),
            Op::GetDomainPath => one_domid(payload).map(|d| text(&format!("/local/domain/{d}"))),
            Op::Introduce => self.introduce_request(payload),
            Op::Release => self.release_request(payload),
            Op::IsDomainIntroduced => {
                one_domid(payload).map(|d| text(if self.is_introduced(d) { "T" } else { "F" }))
            }
            Op::Resume => one_domid(payload).and_then(|d| {
                if self.is_introduced(d) {
                    Ok(ok())
                } else {
                    Err(XsErrno::NoEnt)
                }
            }),
            Op::SetTarget => self.set_target_request(payload),
            Op::Control => self.control(payload),
            Op::WatchEvent
            | Op::Error
            | Op::GetFeature
            | Op::SetFeature
            | Op::GetQuota
            | Op::SetQuota => Err(XsErrno::NoSys),
        }?;
        if answer.len() > PAYLOAD_MAX {
            Err(XsErrno::TooBig)
        } else {
            Ok(answer)
        }
    }

    /// Drops a connection's watches and transactions, and the events that wait.
    pub(super) fn reset(&mut self, conn: ConnId) {
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

    fn node_request(&mut self, conn: ConnId, op: Op, tx_id: u32, payload: &[u8]) -> Answer {
        let (path, rest) = split_string(payload).ok_or(XsErrno::Inval)?;
        let path = self.absolute(conn, path)?;
        if !matches!(op, Op::Write | Op::DirectoryPart) && !rest.is_empty() {
            return Err(XsErrno::Inval);
        }
        self.with_caller(conn, tx_id, |caller| match op {
            Op::Read => caller.find(&path, Need::Read).map(|n| n.value),
            Op::Write => caller.write(&path, rest).map(|()| ok()),
            Op::Mkdir => caller.mkdir(&path).map(|()| ok()),
            Op::Rm => caller.rm(&path).map(|()| ok()),
            Op::GetPerms => {
                let node = caller.find(&path, Need::Read)?;
                Ok(node
                    .perms
                    .iter()
                    .flat_map(|p| text(&p.to_string()))
                    .collect())
            }
            Op::Directory => Ok(join(&caller.find(&path, Need::Read)?.children)),
            Op::DirectoryPart => directory_part(caller, &path, rest),
            _ => Err(XsErrno::NoSys),
        })
    }

    fn set_perms(&mut self, conn: ConnId, tx_id: u32, payload: &[u8]) -> Answer {
        let (path, rest) = split_string(payload).ok_or(XsErrno::Inval)?;
        let perms = strings(rest)
            .map(|entry| Perm::parse(entry).map_err(|_| XsErrno::Inval))
            .collect::<Result<Vec<_>, _>>()?;
        if perms.is_empty() {
            return Err(XsErrno::Inval);
        }
        if path.first() == Some(&b'@') {
            // Only the two special events have permissions, and only dom0 may set them.
            if !self.is_privileged(conn) {
                return Err(XsErrno::Acces);
            }
            let place = match path {
                b"@introduceDomain" => &mut self.introduce_perms,
                b"@releaseDomain" => &mut self.release_perms,
                _ => return Err(XsErrno::NoEnt),
            };
            *place = perms.into();
            return Ok(ok());
        }
        let path = self.absolute(conn, path)?;
        self.with_caller(conn, tx_id, |caller| {
            caller.set_perms(&path, perms).map(|()| ok())
        })
    }

    fn watch(&mut self, conn: ConnId, payload: &[u8]) -> Answer {
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
        let watch = Watch {
            conn,
            token: token.into(),
            depth,
            strip,
        };
        if let Some(c) = self.conns.get_mut(&conn) {
            c.watches.insert((path.clone(), token.into()));
            // The first event comes at once, so that a client need not look before it watches.
            let shown = watch.show(&path);
            c.events.push(shown, shown, token, self.quota.events);
        }
        self.watches.add(&path, watch);
        Ok(ok())
    }

    fn unwatch(&mut self, conn: ConnId, payload: &[u8]) -> Answer {
        let mut args = strings(payload);
        let (path, token) = args.next().zip(args.next()).ok_or(XsErrno::Inval)?;
        // No watch is on a path that is none.
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

    fn transaction_start(&mut self, conn: ConnId, tx_id: u32) -> Answer {
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

    fn transaction_end(&mut self, conn: ConnId, tx_id: u32, payload: &[u8]) -> Answer {
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

    fn introduce_request(&mut self, payload: &[u8]) -> Answer {
        let mut args = strings(payload);
        let domid = args.next().and_then(real_guest).ok_or(XsErrno::Inval)?;
        // The page and the port must be given, as ever, but connections come from the embedder.
        args.next().zip(args.next()).ok_or(XsErrno::Inval)?;
        self.introduce(domid);
        Ok(ok())
    }

    fn release_request(&mut self, payload: &[u8]) -> Answer {
        let domid = strings(payload)
            .next()
            .and_then(real_guest)
            .ok_or(XsErrno::Inval)?;
        if self.release(domid) {
            Ok(ok())
        } else {
            Err(XsErrno::NoEnt)
        }
    }

    fn set_target_request(&mut self, payload: &[u8]) -> Answer {
        let mut args = strings(payload);
        let domid = args.next().and_then(real_guest).ok_or(XsErrno::Inval)?;
        let target = args.next().and_then(real_guest).ok_or(XsErrno::Inval)?;
        if self.set_target(domid, target) {
            Ok(ok())
        } else {
            Err(XsErrno::NoEnt)
        }
    }

    fn control(&mut self, payload: &[u8]) -> Answer {
        let mut args = strings(payload);
        match args.next() {
            Some(b"check") => self.check().map(|()| ok()).map_err(|_| XsErrno::Io),
            Some(b"help") => Ok(text("check\nhelp\nquota [<domid>]")),
            Some(b"quota") => {
                let q = &self.quota;
                let lines = match args.next() {
                    None | Some(b"") => format!(
                        "nodes {}\nwatches {}\ntransactions {}\noutstanding {}\ntransaction-nodes {}\nmemory {}\nnode-size {}\npermissions {}",
                        q.nodes,
                        q.watches,
                        q.transactions,
                        q.outstanding,
                        q.transaction_nodes,
                        q.memory,
                        q.node_size,
                        q.perms
                    ),
                    Some(arg) => {
                        let domid = parse_u16(arg).map(DomId).ok_or(XsErrno::Inval)?;
                        let d = self.domains.get(&domid).ok_or(XsErrno::NoEnt)?;
                        format!(
                            "nodes {}\nwatches {}\nmemory {}",
                            self.tree.owned(domid).nodes,
                            d.watches,
                            self.held(domid)
                        )
                    }
                };
                Ok(text(&lines))
            }
            _ => Err(XsErrno::Inval),
        }
    }

    fn with_caller<R>(
        &mut self,
        conn: ConnId,
        tx_id: u32,
        work: impl FnOnce(&mut Caller<'_>) -> Result<R, XsErrno>,
    ) -> Result<R, XsErrno> {
        let domid = self.conns.get(&conn).ok_or(XsErrno::Io)?.domid;
        let memory_left = (domid != DomId::DOM0).then(|| self.memory_left(domid));
        let target = self.domains.get(&domid).and_then(|d| d.target);
        let tx = self
            .conns
            .get_mut(&conn)
            .and_then(|c| c.transactions.get_mut(&tx_id));
        let limits = memory_left.map(|left| ViewLimits {
            transaction_nodes: self.quota.transaction_nodes,
            bytes: left.saturating_add(tx.as_ref().map_or(0, |t| t.bytes)),
        });
        let view = View {
            tree: &mut self.tree,
            tx,
            domid,
            limits,
            changes: Vec::new(),
        };
        let mut caller = Caller {
            view,
            domid,
            target,
            quota: &self.quota,
            memory_left,
        };
        let result = work(&mut caller);
        let changes = core::mem::take(&mut caller.view.changes);
        self.fire(&changes);
        result
    }

    /// The absolute form of a path that names a node.
    fn absolute(&self, conn: ConnId, path: &[u8]) -> Result<Box<str>, XsErrno> {
        match WirePath::parse(path).map_err(|_| XsErrno::Inval)? {
            WirePath::Absolute(p) => Ok(p.into()),
            WirePath::Relative(p) => {
                let domid = self.conns.get(&conn).ok_or(XsErrno::Io)?.domid;
                let full = format!("/local/domain/{domid}/{p}");
                if full.len() > ABS_PATH_MAX {
                    Err(XsErrno::Inval)
                } else {
                    Ok(full.into())
                }
            }
            WirePath::Special(_) => Err(XsErrno::Inval),
        }
    }

    /// The absolute form of a path to watch, and how much of it the client does not spell.
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

    /// Bytes held on a domain's behalf.
    fn held(&self, domid: DomId) -> usize {
        let in_transactions: usize = self
            .conns
            .values()
            .filter(|c| c.domid == domid)
            .flat_map(|c| c.transactions.values())
            .map(|t| t.bytes)
            .sum();
        self.tree
            .owned(domid)
            .bytes
            .saturating_add(self.domains.get(&domid).map_or(0, |d| d.watch_bytes))
            .saturating_add(in_transactions)
    }

    fn memory_left(&self, domid: DomId) -> usize {
        self.quota.memory.saturating_sub(self.held(domid))
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

/// The children from a byte offset on, behind the node's generation, as many as fit. The end of
/// the list is marked by an empty name.
fn directory_part(caller: &mut Caller<'_>, path: &str, rest: &[u8]) -> Answer {
    let (offset, tail) = split_string(rest).ok_or(XsErrno::Inval)?;
    if !tail.is_empty() {
        return Err(XsErrno::Inval);
    }
    let offset = parse_u64(offset).ok_or(XsErrno::Inval)?;
    let offset = usize::try_from(offset).map_err(|_| XsErrno::Inval)?;
    let node = caller.find(path, Need::Read)?;
    let mut out = text(&node.generation.to_string());
    let all = join(&node.children);
    let list = all.get(offset..).unwrap_or(&[]);
    let mut taken = 0_usize;
    for name in strings(list) {
        let with_nul = name.len().saturating_add(1);
        // One byte stays free for the mark of the end.
        if out.len().saturating_add(with_nul) >= PAYLOAD_MAX {
            return Ok(out);
        }
        out.extend_from_slice(name);
        out.push(0);
        taken = taken.saturating_add(with_nul);
    }
    debug_assert_eq!(taken, list.len());
    out.push(0);
    Ok(out)
}

fn one_domid(payload: &[u8]) -> Result<DomId, XsErrno> {
    strings(payload)
        .next()
        .and_then(parse_u16)
        .map(DomId)
        .ok_or(XsErrno::Inval)
}

fn real_guest(text: &[u8]) -> Option<DomId> {
    parse_u16(text)
        .map(DomId)
        .filter(|d| *d != DomId::DOM0 && d.is_real())
}

fn watch_cost(path: &str, token: &[u8]) -> usize {
    path.len()
        .saturating_add(token.len())
        .saturating_add(WATCH_OVERHEAD)
}

fn join<'a>(names: impl IntoIterator<Item = &'a Box<str>>) -> Vec<u8> {
    names
        .into_iter()
        .flat_map(|name| name.bytes().chain(core::iter::once(0)))
        .collect()
}

fn ok() -> Vec<u8> {
    text("OK")
}

fn text(s: &str) -> Vec<u8> {
    let mut bytes = String::from(s).into_bytes();
    bytes.push(0);
    bytes
}
