//! A domain's state apart from its nodes, and its permissions.

use pvio_ring::DomId;
use pvio_xenbus::wire::{Access, Perm};

/// State of a domain in the store, apart from the nodes that it owns.
#[derive(Default, Debug)]
pub(crate) struct Domain {
    pub introduced: bool,
    /// The domain whose permissions this one also has (`SET_TARGET`).
    pub target: Option<DomId>,
    pub watches: usize,
    pub watch_bytes: usize,
}

/// Access of a caller to a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Rights {
    pub read: bool,
    pub write: bool,
    pub own: bool,
}

/// Evaluates a node's permissions: dom0 and the owner have full access, a listed domain has the
/// access of its entry, others have that of the first entry.
pub(crate) fn rights(domid: DomId, target: Option<DomId>, perms: &[Perm]) -> Rights {
    let of =
        |access: Access| Rights { read: access.can_read(), write: access.can_write(), own: false };
    let is_me = |p: &Perm| p.domid == domid || Some(p.domid) == target;
    let Some((first, others)) = perms.split_first() else {
        return of(Access::None);
    };
    if domid == DomId::DOM0 || is_me(first) {
        return Rights { read: true, write: true, own: true };
    }
    of(others.iter().find(|p| is_me(p)).unwrap_or(first).access)
}
