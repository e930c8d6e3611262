//! The nodes and their owners' totals; transactions as a layer over the nodes.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use pvio_ring::DomId;

use pvio_xenbus::wire::{Access as Allowed, Perm, XsErrno, parent};

/// Memory that counts for a node, besides its path, value, permissions and children's names, in
/// bytes: an estimate of the maps' overhead, so that many empty nodes count, too.
const NODE_OVERHEAD: usize = 128;
const PERM_SIZE: usize = 8;

#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub value: Vec<u8>,
    /// Never empty; the first entry names the owner.
    pub perms: Arc<[Perm]>,
    pub children: BTreeSet<Box<str>>,
    /// Total length of the children's names and their NULs, so that it need not be summed up each
    /// time.
    pub children_bytes: usize,
    /// Changes with every change of the node, its list of children included.
    pub generation: u64,
}

impl Node {
    pub fn new(perms: Arc<[Perm]>, value: Vec<u8>) -> Self {
        Self { value, perms, children: BTreeSet::new(), children_bytes: 0, generation: 0 }
    }

    pub fn owner(&self) -> DomId {
        self.perms.first().map_or(DomId::DOM0, |p| p.domid)
    }

    /// Returns the size that [`crate::Quota::node_size`] limits.
    pub fn size(&self) -> usize {
        self.value
            .len()
            .saturating_add(self.children_bytes)
            .saturating_add(self.perms.len().saturating_mul(PERM_SIZE))
    }

    pub fn add_child(&mut self, name: &str) {
        if self.children.insert(name.into()) {
            self.children_bytes = self.children_bytes.saturating_add(name.len()).saturating_add(1);
        }
    }

    pub fn remove_child(&mut self, name: &str) {
        if self.children.remove(name) {
            self.children_bytes = self.children_bytes.saturating_sub(name.len()).saturating_sub(1);
        }
    }

    fn cost(&self, path: &str) -> usize {
        self.size().saturating_add(path.len()).saturating_add(NODE_OVERHEAD)
    }
}

/// Totals of the nodes that a domain owns in the committed tree.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) struct Owned {
    pub nodes: usize,
    pub bytes: usize,
}

/// The committed tree: every node by its absolute path.
#[derive(Debug)]
pub(crate) struct Tree {
    nodes: BTreeMap<Box<str>, Node>,
    owned: BTreeMap<DomId, Owned>,
    generation: u64,
}

impl Tree {
    pub fn new() -> Self {
        let mut tree = Self { nodes: BTreeMap::new(), owned: BTreeMap::new(), generation: 0 };
        let perms: Arc<[Perm]> = Arc::new([Perm::new(DomId::DOM0, Allowed::None)]);
        tree.put("/", Node::new(perms, Vec::new()));
        tree
    }

    pub fn get(&self, path: &str) -> Option<&Node> {
        self.nodes.get(path)
    }

    pub fn owned(&self, domid: DomId) -> Owned {
        self.owned.get(&domid).copied().unwrap_or_default()
    }

    pub fn put(&mut self, path: &str, mut node: Node) {
        self.remove(path);
        self.generation = self.generation.wrapping_add(1);
        node.generation = self.generation;
        let owned = self.owned.entry(node.owner()).or_default();
        owned.nodes = owned.nodes.saturating_add(1);
        owned.bytes = owned.bytes.saturating_add(node.cost(path));
        self.nodes.insert(path.into(), node);
    }

    pub fn remove(&mut self, path: &str) {
        let Some(node) = self.nodes.remove(path) else {
            return;
        };
        if let Some(owned) = self.owned.get_mut(&node.owner()) {
            owned.nodes = owned.nodes.saturating_sub(1);
            owned.bytes = owned.bytes.saturating_sub(node.cost(path));
            if owned.nodes == 0 {
                self.owned.remove(&node.owner());
            }
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(path, node)| (&**path, node))
    }

    /// Checks that the tree is consistent; the error is the first inconsistent path.
    pub fn check(&self) -> Result<(), String> {
        let mut owned: BTreeMap<DomId, Owned> = BTreeMap::new();
        for (path, node) in self.iter() {
            let o = owned.entry(node.owner()).or_default();
            o.nodes = o.nodes.saturating_add(1);
            o.bytes = o.bytes.saturating_add(node.cost(path));
            let names: usize = node.children.iter().map(|c| c.len().saturating_add(1)).sum();
            if names != node.children_bytes || node.perms.is_empty() {
                return Err(path.into());
            }
            if node.children.iter().any(|c| !self.nodes.contains_key(child_path(path, c).as_str()))
            {
                return Err(path.into());
            }
            if let Some(up) = parent(path) {
                let listed = self.get(up).is_some_and(|p| p.children.contains(leaf(path)));
                if !listed {
                    return Err(path.into());
                }
            }
        }
        if owned == self.owned { Ok(()) } else { Err("the accounts".into()) }
    }
}

/// A change to be reported to watches.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub path: Box<str>,
    /// Whether only watches on exactly this path get it (a node below one that was removed).
    pub exact: bool,
    /// Permissions of the node and its parent before the change: a domain that has just lost the
    /// read permission for a node is still notified of its removal.
    pub node_perms: Option<Arc<[Perm]>>,
    pub parent_perms: Option<Arc<[Perm]>>,
}

#[derive(Debug)]
struct Seen {
    /// The committed node's generation at the first access; `None` if there was none.
    base: Option<u64>,
    node: Option<Node>,
    changed: bool,
}

/// An open transaction: private copies of the nodes that it has accessed.
#[derive(Debug, Default)]
pub(crate) struct Transaction {
    seen: BTreeMap<Box<str>, Seen>,
    changes: Vec<Change>,
    reported: BTreeSet<(Box<str>, bool)>,
    /// Number of nodes that a commit would add to those that its domain owns.
    added_nodes: isize,
    /// Memory held, in bytes.
    pub bytes: usize,
}

/// Limits of one request's view.
#[derive(Clone, Copy)]
pub(crate) struct ViewLimits {
    pub transaction_nodes: usize,
    /// Maximum memory of the transaction, in bytes.
    pub bytes: usize,
}

/// The tree as seen by one request: committed, or through a transaction.
pub(crate) struct View<'a> {
    pub tree: &'a mut Tree,
    pub tx: Option<&'a mut Transaction>,
    pub domid: DomId,
    /// `None` for a privileged caller.
    pub limits: Option<ViewLimits>,
    pub changes: Vec<Change>,
}

impl View<'_> {
    /// Returns the node; in a transaction, the commit depends on it from then on.
    pub fn get(&mut self, path: &str) -> Result<Option<&Node>, XsErrno> {
        let Some(tx) = self.tx.as_deref_mut() else {
            return Ok(self.tree.get(path));
        };
        if !tx.seen.contains_key(path) {
            let node = self.tree.get(path).cloned();
            let cost =
                node.as_ref().map_or(path.len().saturating_add(NODE_OVERHEAD), |n| n.cost(path));
            if let Some(limits) = self.limits {
                if tx.seen.len() >= limits.transaction_nodes {
                    return Err(XsErrno::NoSpc);
                }
                if tx.bytes.saturating_add(cost) > limits.bytes {
                    return Err(XsErrno::NoMem);
                }
            }
            tx.bytes = tx.bytes.saturating_add(cost);
            let base = node.as_ref().map(|n| n.generation);
            tx.seen.insert(path.into(), Seen { base, node, changed: false });
        }
        Ok(tx.seen.get(path).and_then(|s| s.node.as_ref()))
    }

    /// Returns the node, without making the commit depend on it.
    pub fn peek(&self, path: &str) -> Option<&Node> {
        match self.tx.as_deref().and_then(|tx| tx.seen.get(path)) {
            Some(seen) => seen.node.as_ref(),
            None => self.tree.get(path),
        }
    }

    /// Replaces a node. It must have been accessed with [`View::get`].
    pub fn put(&mut self, path: &str, node: Node) {
        let Some(tx) = self.tx.as_deref_mut() else {
            self.tree.put(path, node);
            return;
        };
        let Some(seen) = tx.seen.get_mut(path) else {
            return;
        };
        let domid = self.domid;
        let mine = |n: &Option<Node>| isize::from(n.as_ref().is_some_and(|n| n.owner() == domid));
        let was = mine(&seen.node);
        tx.bytes = tx
            .bytes
            .saturating_sub(seen.node.as_ref().map_or(0, |n| n.cost(path)))
            .saturating_add(node.cost(path));
        seen.node = Some(node);
        seen.changed = true;
        tx.added_nodes = tx.added_nodes.saturating_add(mine(&seen.node)).saturating_sub(was);
    }

    /// Removes a node. It must have been accessed with [`View::get`].
    pub fn remove(&mut self, path: &str) {
        let Some(tx) = self.tx.as_deref_mut() else {
            self.tree.remove(path);
            return;
        };
        let Some(seen) = tx.seen.get_mut(path) else {
            return;
        };
        // The entry remains in the transaction, so its bytes still count.
        if seen.node.take().is_some_and(|n| n.owner() == self.domid) {
            tx.added_nodes = tx.added_nodes.saturating_sub(1);
        }
        seen.changed = true;
    }

    /// Returns the number of nodes that the caller's domain owns in this view.
    pub fn owned_nodes(&self) -> usize {
        let added = self.tx.as_deref().map_or(0, |tx| tx.added_nodes);
        self.tree.owned(self.domid).nodes.saturating_add_signed(added)
    }

    /// Records a change for the watches; must be called **before** the change.
    pub fn note(&mut self, path: &str, exact: bool) {
        let perms = |node: Option<&Node>| node.map(|n| Arc::clone(&n.perms));
        let change = Change {
            path: path.into(),
            exact,
            node_perms: perms(self.peek(path)),
            parent_perms: perms(parent(path).and_then(|up| self.peek(up))),
        };
        match self.tx.as_deref_mut() {
            Some(tx) => {
                if tx.reported.insert((change.path.clone(), exact)) {
                    tx.changes.push(change);
                }
            }
            None => self.changes.push(change),
        }
    }
}

impl Transaction {
    /// Applies the transaction if no node that it accessed has changed since, and returns the
    /// changes to report.
    ///
    /// `max_nodes` is the maximum number of nodes that its domain may own afterwards.
    pub fn commit(
        self,
        tree: &mut Tree,
        domid: DomId,
        max_nodes: Option<usize>,
    ) -> Result<Vec<Change>, XsErrno> {
        let current = |path: &str| tree.get(path).map(|n| n.generation);
        let conflicts = self.seen.iter().any(|(path, seen)| current(path) != seen.base);
        if conflicts && !pvio_ring::planted!(TransactionConflict) {
            return Err(XsErrno::Again);
        }
        let after = tree.owned(domid).nodes.saturating_add_signed(self.added_nodes);
        if self.added_nodes > 0 && max_nodes.is_some_and(|max| after > max) {
            return Err(XsErrno::NoSpc);
        }
        for (path, seen) in self.seen {
            if !seen.changed {
                continue;
            }
            match seen.node {
                Some(node) => tree.put(&path, node),
                None => tree.remove(&path),
            }
        }
        Ok(self.changes)
    }
}

/// Returns the last component of an absolute path.
pub(crate) fn leaf(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Returns the path of a child.
pub(crate) fn child_path(path: &str, name: &str) -> String {
    let mut s = String::with_capacity(path.len().saturating_add(name.len()).saturating_add(1));
    if path != "/" {
        s.push_str(path);
    }
    s.push('/');
    s.push_str(name);
    s
}

/// Removes a node and its subtree, and records the changes. In a transaction, the whole subtree
/// must have been accessed.
pub(crate) fn remove_subtree(view: &mut View<'_>, path: &str) {
    let mut paths = alloc::vec![alloc::string::String::from(path)];
    let mut next = 0;
    while let Some(here) = paths.get(next).cloned() {
        if let Some(node) = view.peek(&here) {
            let children = node.children.iter().map(|c| child_path(&here, c)).collect::<Vec<_>>();
            paths.extend(children);
        }
        next = next.saturating_add(1);
    }
    for (i, here) in paths.iter().enumerate() {
        view.note(here, i != 0);
    }
    for here in &paths {
        view.remove(here);
    }
    if let Some(up) = parent(path)
        && let Some(mut node) = view.peek(up).cloned()
    {
        node.remove_child(leaf(path));
        view.put(up, node);
    }
}
