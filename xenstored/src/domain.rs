//! A domain's state beside its nodes, and its rights.

use pvio_ring::DomId;
use pvio_xenbus::wire::{Access, Perm};

/// What the store keeps of a domain beside the nodes it owns.
#[derive(Default, Debug)]
pub(crate) struct Domain {
    pub introduced: bool,
    /// The domain whose rights this one shares (`SET_TARGET`).
    pub target: Option<DomId>,
    pub watches: usize,
    pub watch_bytes: usize,
}

/// What a caller may do with a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Rights {
    pub read: bool,
    pub write: bool,
    pub own: bool,
}

/// Evaluates a node's permissions: dom0 and the owner may do everything, a listed domain what
/// its entry says, others what the first entry says.
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
