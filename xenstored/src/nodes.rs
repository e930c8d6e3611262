//! Operations on nodes: lookup with permission check, write, create, remove.

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use pvio_ring::DomId;

use crate::domain::{Rights, rights};
use crate::quota::Quota;
use crate::tree::{Node, View, child_path, leaf, remove_subtree};
use pvio_xenbus::wire::{Perm, XsErrno, parent};

/// A caller, and its view of the tree.
pub(crate) struct Caller<'a> {
    pub view: View<'a>,
    pub domid: DomId,
    pub target: Option<DomId>,
    pub quota: &'a Quota,
    /// Bytes of nodes that the domain may still add; `None` for dom0.
    pub memory_left: Option<usize>,
}

/// The permission that an operation requires.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    Read,
    Write,
    Own,
}

impl Need {
    fn met_by(self, r: Rights) -> bool {
        match self {
            Self::Read => r.read,
            Self::Write => r.write,
            Self::Own => r.write && r.own,
        }
    }

    fn hinted_by(self, r: Rights) -> bool {
        match self {
            Self::Read => r.read,
            Self::Write => r.write,
            Self::Own => r.write || r.own,
        }
    }
}

impl Caller<'_> {
    fn privileged(&self) -> bool {
        self.domid == DomId::DOM0
    }

    fn rights(&self, perms: &[Perm]) -> Rights {
        rights(self.domid, self.target, perms)
    }

    /// Returns a copy of the node, if it exists and the caller has the permission.
    ///
    /// If the caller does not have the permission for the nearest existing node above, the result
    /// is `EACCES`, so that the caller cannot find out whether the node exists.
    pub fn find(&mut self, path: &str, need: Need) -> Result<Node, XsErrno> {
        let errno = match self.view.get(path)?.cloned() {
            Some(node) if need.met_by(self.rights(&node.perms)) => return Ok(node),
            Some(_) => XsErrno::Acces,
            None => XsErrno::NoEnt,
        };
        let mut at = path;
        while let Some(up) = parent(at) {
            if let Some(perms) = self.view.get(up)?.map(|n| Arc::clone(&n.perms)) {
                return Err(if need.hinted_by(self.rights(&perms)) {
                    errno
                } else {
                    XsErrno::Acces
                });
            }
            at = up;
        }
        Err(errno)
    }

    pub fn write(&mut self, path: &str, value: &[u8]) -> Result<(), XsErrno> {
        match self.find(path, Need::Write) {
            Ok(mut node) => {
                let grows = value.len().saturating_sub(node.value.len());
                node.value = value.to_vec();
                self.check_size(&node, grows)?;
                self.view.note(path, false);
                self.view.put(path, node);
                Ok(())
            }
            Err(XsErrno::NoEnt) => self.create(path, value),
            Err(errno) => Err(errno),
        }
    }

    pub fn mkdir(&mut self, path: &str) -> Result<(), XsErrno> {
        match self.find(path, Need::Write) {
            Ok(_) => Ok(()),
            Err(XsErrno::NoEnt) => self.create(path, &[]),
            Err(errno) => Err(errno),
        }
    }

    pub fn rm(&mut self, path: &str) -> Result<(), XsErrno> {
        match self.find(path, Need::Write) {
            Ok(_) => {}
            Err(XsErrno::NoEnt) => {
                // A missing node is not an error if its parent exists.
                let up = parent(path).ok_or(XsErrno::NoEnt)?;
                return self.view.get(up)?.map(|_| ()).ok_or(XsErrno::NoEnt);
            }
            Err(errno) => return Err(errno),
        }
        let up = parent(path).ok_or(XsErrno::Inval)?;
        // Accesses all nodes that will change first, so that an exceeded quota leaves nothing half
        // done.
        self.view.get(up)?;
        let mut left = alloc::vec![String::from(path)];
        while let Some(here) = left.pop() {
            if let Some(node) = self.view.get(&here)? {
                let children =
                    node.children.iter().map(|c| child_path(&here, c)).collect::<Vec<_>>();
                left.extend(children);
            }
        }
        remove_subtree(&mut self.view, path);
        Ok(())
    }

    pub fn set_perms(&mut self, path: &str, perms: Vec<Perm>) -> Result<(), XsErrno> {
        let owner = perms.first().ok_or(XsErrno::Inval)?.domid;
        if !self.privileged() && perms.len() > self.quota.perms {
            return Err(XsErrno::NoSpc);
        }
        let mut node = self.find(path, Need::Own)?;
        if !self.privileged() && owner != node.owner() {
            return Err(XsErrno::Perm);
        }
        node.perms = perms.into();
        self.check_size(&node, 0)?;
        self.view.note(path, false);
        self.view.put(path, node);
        Ok(())
    }

    /// Creates a node and its missing parents, all or nothing. The caller has checked the
    /// permission.
    fn create(&mut self, path: &str, value: &[u8]) -> Result<(), XsErrno> {
        let mut missing = alloc::vec![path];
        let mut at = path;
        let (anchor_path, mut anchor) = loop {
            let up = parent(at).ok_or(XsErrno::Inval)?;
            if let Some(node) = self.view.get(up)? {
                break (up, node.clone());
            }
            missing.push(up);
            at = up;
        };
        if !self.privileged()
            && self.view.owned_nodes().saturating_add(missing.len()) > self.quota.nodes
        {
            return Err(XsErrno::NoSpc);
        }
        let perms = self.inherit(&anchor.perms);
        let names: usize = missing.iter().map(|p| p.len().saturating_add(128)).sum();
        anchor.add_child(leaf(at));
        self.check_size(&anchor, 0)?;
        self.check_size(
            &Node::new(Arc::clone(&perms), value.to_vec()),
            names.saturating_add(value.len()),
        )?;
        self.view.note(path, false);
        self.view.put(anchor_path, anchor);
        // From the top down; the children of each but the last contain the next one.
        let mut below = missing.iter().rev().skip(1);
        for here in missing.iter().rev() {
            let mut node = Node::new(Arc::clone(&perms), Vec::new());
            match below.next() {
                Some(child) => node.add_child(leaf(child)),
                None => node.value = value.to_vec(),
            }
            self.view.put(here, node);
        }
        Ok(())
    }

    /// Returns the permissions of a new node: its parent's, but owned by the caller if it is
    /// unprivileged.
    fn inherit(&self, perms: &Arc<[Perm]>) -> Arc<[Perm]> {
        if self.privileged() {
            return Arc::clone(perms);
        }
        let mut mine: Vec<Perm> = perms.to_vec();
        if let Some(first) = mine.first_mut() {
            first.domid = self.domid;
        }
        mine.into()
    }

    fn check_size(&self, node: &Node, grows: usize) -> Result<(), XsErrno> {
        if self.privileged() {
            return Ok(());
        }
        if node.size() > self.quota.node_size {
            return Err(XsErrno::NoSpc);
        }
        match self.memory_left {
            Some(left) if grows > left => Err(XsErrno::NoMem),
            _ => Ok(()),
        }
    }
}
