//! Introduction and release of domains.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use pvio_ring::DomId;
use pvio_xenbus::wire::{Access, Perm};

use crate::domain::rights;
use crate::id::ConnId;
use crate::store::Store;
use crate::tree::{View, remove_subtree};

impl Store {
    /// Introduces a domain and fires `@introduceDomain`. Returns whether it was not introduced
    /// before; otherwise nothing changes.
    pub fn introduce(&mut self, domid: DomId) -> bool {
        let domain = self.domains.entry(domid).or_default();
        if domain.introduced {
            return false;
        }
        domain.introduced = true;
        self.fire_special("@introduceDomain", domid);
        true
    }

    /// Returns whether a domain is introduced and not released. Dom0 always is.
    #[must_use]
    pub fn is_introduced(&self, domid: DomId) -> bool {
        self.domains.get(&domid).is_some_and(|d| d.introduced)
    }

    /// Releases a domain: drops its connections (see [`Store::take_dropped`]) with their watches
    /// and transactions, removes the nodes that it owns with their subtrees, removes it from the
    /// permissions of other nodes, and fires `@releaseDomain`. Returns whether there was any state
    /// of the domain.
    ///
    /// Dom0 is never released.
    pub fn release(&mut self, domid: DomId) -> bool {
        if domid == DomId::DOM0 {
            return false;
        }
        let gone: Vec<ConnId> =
            self.conns.iter().filter(|(_, c)| c.domid == domid).map(|(&id, _)| id).collect();
        for &conn in &gone {
            self.reset(conn);
            self.conns.remove(&conn);
            self.dropped.push(conn);
        }
        let known = self.domains.remove(&domid).is_some();
        for other in self.domains.values_mut().filter(|d| d.target == Some(domid)) {
            other.target = None;
        }
        let had_nodes = self.remove_nodes_of(domid);
        if known || had_nodes {
            self.fire_special("@releaseDomain", domid);
        }
        known || had_nodes
    }

    /// Gives `domid` the permissions of `target` in addition to its own. Both must be introduced.
    pub(crate) fn set_target(&mut self, domid: DomId, target: DomId) -> bool {
        if !self.is_introduced(target) {
            return false;
        }
        match self.domains.get_mut(&domid) {
            Some(d) if d.introduced => {
                d.target = Some(target);
                true
            }
            _ => false,
        }
    }

    /// Fires a special event for those with read permission. A watch of depth 1, or one on
    /// `@…/<domid>`, gets the number of the domain.
    pub(crate) fn fire_special(&mut self, name: &'static str, domid: DomId) {
        let perms =
            if name == "@introduceDomain" { &self.introduce_perms } else { &self.release_perms };
        let perms = Arc::clone(perms);
        let named = alloc::format!("{name}/{domid}");
        for on in [name, named.as_str()] {
            for watch in self.watches.on(on) {
                let Some(c) = self.conns.get_mut(&watch.conn) else {
                    continue;
                };
                let target = self.domains.get(&c.domid).and_then(|d| d.target);
                if rights(c.domid, target, &perms).read {
                    let path = if watch.depth == Some(1) { named.as_str() } else { on };
                    c.events.push(path, on, &watch.token, self.quota.events);
                }
            }
        }
    }

    /// Removes the state of a domain that was never introduced, once its last connection is gone.
    pub(crate) fn forget_idle_domain(&mut self, domid: DomId) {
        let idle = self.domains.get(&domid).is_some_and(|d| !d.introduced && d.target.is_none());
        if idle && !self.conns.values().any(|c| c.domid == domid) {
            self.domains.remove(&domid);
        }
    }

    fn remove_nodes_of(&mut self, domid: DomId) -> bool {
        let mut found = false;
        let mut view = View {
            tree: &mut self.tree,
            tx: None,
            domid: DomId::DOM0,
            limits: None,
            changes: Vec::new(),
        };
        // In path order a parent precedes its children, so a whole subtree is removed in one step,
        // and its nodes are no longer found when their turn comes.
        let owned: Vec<Box<str>> =
            view.tree.iter().filter(|(_, n)| n.owner() == domid).map(|(p, _)| p.into()).collect();
        for path in owned {
            if &*path == "/" {
                // The root is not removed; dom0 becomes its owner.
                if let Some(mut root) = view.tree.get("/").cloned() {
                    root.perms = Arc::new([Perm::new(DomId::DOM0, Access::None)]);
                    view.tree.put("/", root);
                }
            } else if view.tree.get(&path).is_some() {
                remove_subtree(&mut view, &path);
            }
            found = true;
        }
        let listed: Vec<Box<str>> = view
            .tree
            .iter()
            .filter(|(_, n)| n.perms.iter().skip(1).any(|p| p.domid == domid))
            .map(|(p, _)| p.into())
            .collect();
        for path in listed {
            if let Some(mut node) = view.tree.get(&path).cloned() {
                let keep =
                    node.perms.iter().enumerate().filter(|(i, p)| *i == 0 || p.domid != domid);
                node.perms = keep.map(|(_, p)| *p).collect();
                view.tree.put(&path, node);
            }
        }
        let changes = view.changes;
        self.fire(&changes);
        found
    }
}
