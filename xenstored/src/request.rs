//! Executes one request and returns the payload of its response.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::ToString;
use alloc::vec::Vec;

use pvio_ring::DomId;

use crate::domain::rights;
use crate::id::ConnId;
use crate::nodes::{Caller, Need};
use crate::response::{Response, ok, text};
use crate::store::Store;
use crate::tree::{View, ViewLimits};
use pvio_xenbus::wire::{
    ABS_PATH_MAX, Op, PAYLOAD_MAX, Perm, WirePath, XsErrno, parse_u16, parse_u64, split_string,
    strings,
};

impl Store {
    /// Executes one request and returns the payload of its response, at most 4096 bytes.
    pub(crate) fn execute(&mut self, conn: ConnId, op: Op, tx_id: u32, payload: &[u8]) -> Response {
        if payload.len() > PAYLOAD_MAX {
            return Err(XsErrno::Inval);
        }
        // Operations that only a server sends, and those newer than the supported release.
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
        // Watches are not part of transactions: the transaction number is ignored.
        let ignores_tx = matches!(op, Op::Watch | Op::Unwatch);
        if tx_id != 0 && !ignores_tx {
            let open = self.conns.get(&conn).is_some_and(|c| c.transactions.contains_key(&tx_id));
            if !open {
                return Err(XsErrno::NoEnt);
            }
        }
        let response = match op {
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
            Op::Resume => one_domid(payload)
                .and_then(|d| if self.is_introduced(d) { Ok(ok()) } else { Err(XsErrno::NoEnt) }),
            Op::SetTarget => self.set_target_request(payload),
            Op::Control => self.control(payload),
            Op::WatchEvent
            | Op::Error
            | Op::GetFeature
            | Op::SetFeature
            | Op::GetQuota
            | Op::SetQuota => Err(XsErrno::NoSys),
        }?;
        if response.len() > PAYLOAD_MAX { Err(XsErrno::TooBig) } else { Ok(response) }
    }

    fn node_request(&mut self, conn: ConnId, op: Op, tx_id: u32, payload: &[u8]) -> Response {
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
                Ok(node.perms.iter().flat_map(|p| text(&p.to_string())).collect())
            }
            Op::Directory => Ok(join(&caller.find(&path, Need::Read)?.children)),
            Op::DirectoryPart => directory_part(caller, &path, rest),
            _ => Err(XsErrno::NoSys),
        })
    }

    fn set_perms(&mut self, conn: ConnId, tx_id: u32, payload: &[u8]) -> Response {
        let (path, rest) = split_string(payload).ok_or(XsErrno::Inval)?;
        let perms = strings(rest)
            .map(|entry| Perm::parse(entry).map_err(|_| XsErrno::Inval))
            .collect::<Result<Vec<_>, _>>()?;
        if perms.is_empty() {
            return Err(XsErrno::Inval);
        }
        if path.first() == Some(&b'@') {
            // Only the two special events have permissions; their owner may transfer them.
            let place = match path {
                b"@introduceDomain" => &mut self.introduce_perms,
                b"@releaseDomain" => &mut self.release_perms,
                _ => return Err(XsErrno::Inval),
            };
            let domid = self.conns.get(&conn).ok_or(XsErrno::Io)?.domid;
            let target = self.domains.get(&domid).and_then(|d| d.target);
            if !rights(domid, target, place).own {
                return Err(XsErrno::Acces);
            }
            *place = perms.into();
            return Ok(ok());
        }
        let path = self.absolute(conn, path)?;
        self.with_caller(conn, tx_id, |caller| caller.set_perms(&path, perms).map(|()| ok()))
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
        let tx = self.conns.get_mut(&conn).and_then(|c| c.transactions.get_mut(&tx_id));
        let limits = memory_left.map(|left| ViewLimits {
            transaction_nodes: self.quota.transaction_nodes,
            bytes: left.saturating_add(tx.as_ref().map_or(0, |t| t.bytes)),
        });
        let view = View { tree: &mut self.tree, tx, domid, limits, changes: Vec::new() };
        let mut caller = Caller { view, domid, target, quota: &self.quota, memory_left };
        let result = work(&mut caller);
        let changes = core::mem::take(&mut caller.view.changes);
        self.fire(&changes);
        result
    }

    /// Returns the absolute form of a path that names a node.
    pub(crate) fn absolute(&self, conn: ConnId, path: &[u8]) -> Result<Box<str>, XsErrno> {
        match WirePath::parse(path).map_err(|_| XsErrno::Inval)? {
            WirePath::Absolute(p) => Ok(p.into()),
            WirePath::Relative(p) => {
                let domid = self.conns.get(&conn).ok_or(XsErrno::Io)?.domid;
                let full = format!("/local/domain/{domid}/{p}");
                if full.len() > ABS_PATH_MAX { Err(XsErrno::Inval) } else { Ok(full.into()) }
            }
            WirePath::Special(_) => Err(XsErrno::Inval),
        }
    }

    /// Returns the bytes of memory that count against a domain's quota.
    pub(crate) fn held(&self, domid: DomId) -> usize {
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

    pub(crate) fn memory_left(&self, domid: DomId) -> usize {
        self.quota.memory.saturating_sub(self.held(domid))
    }
}

/// Returns the node's generation, followed by as many children as fit, from a byte offset on. The
/// end of the list is marked by an empty name.
fn directory_part(caller: &mut Caller<'_>, path: &str, rest: &[u8]) -> Response {
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
        // One byte is reserved for the end mark.
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
    strings(payload).next().and_then(parse_u16).map(DomId).ok_or(XsErrno::Inval)
}

fn join<'a>(names: impl IntoIterator<Item = &'a Box<str>>) -> Vec<u8> {
    names.into_iter().flat_map(|name| name.bytes().chain(core::iter::once(0))).collect()
}
