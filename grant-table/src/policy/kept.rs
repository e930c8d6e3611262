use super::{access, in_page, through};
use crate::{Access, CopyOp, DomId, GrantCopier, GrantMapper, GrantRef, GrantStatus};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::fmt;

/// **The peer's promise that its grants stay**: that while the session lasts, it neither ends access
/// to a grant it has named once, nor lets that reference mean another page.
///
/// A peer has given it only if the protocol says so and it was negotiated: blkif's
/// `feature-persistent`, say, or netif's staging grants (`XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING`).
/// **Linux' netfront, like nearly every other, promises nothing of the kind**: it grants a page for
/// one packet, and the same reference means another page soon after. Kept for such a peer, a mapping
/// is of a page that the peer believes to be its own again: packets would be read from there that it
/// never sent, and written over whatever it keeps there now. No memory of ours is at risk, and all
/// of the peer's data is.
///
/// So there is no default and no conversion: whoever makes one of these has seen the promise.
#[derive(Clone, Copy, Debug)]
pub struct GrantsStay(());

impl GrantsStay {
    /// To be called only where what was negotiated says that the peer promised it.
    #[must_use]
    pub const fn promised_by_the_peer() -> Self {
        Self(())
    }
}

/// Copies by mapping, and keeps what it has mapped, up to a number of pages: the one that was not
/// used for longest (by the clock algorithm) goes when another is needed. What it keeps is unmapped
/// when it is dropped.
///
/// Only for peers whose [grants stay](GrantsStay).
pub struct Kept<P: GrantMapper> {
    mapper: P,
    pages: RefCell<Pages<P::Mapping>>,
}

struct Pages<M> {
    most: usize,
    places: BTreeMap<(DomId, GrantRef), usize>,
    slots: Vec<Slot<M>>,
    /// The slot that is looked at next for one to give up.
    hand: usize,
}

struct Slot<M> {
    key: (DomId, GrantRef),
    page: M,
    writable: bool,
    /// Used since the hand came by.
    used: bool,
}

impl<P: GrantMapper> Kept<P> {
    /// Copies by what `mapper` maps, keeping up to `most` pages, at least 1.
    #[must_use]
    pub fn new(mapper: P, most: usize, _promise: GrantsStay) -> Self {
        let most = most.max(1);
        let (places, slots) = (BTreeMap::new(), Vec::with_capacity(most));
        Self { mapper, pages: RefCell::new(Pages { most, places, slots, hand: 0 }) }
    }

    /// How many pages are mapped now.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages.borrow().slots.len()
    }

    /// Whether nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Unmaps a page: the peer takes its grant back.
    pub fn forget(&self, domain: DomId, gref: GrantRef) {
        self.pages.borrow_mut().remove((domain, gref));
    }
}

impl<P: GrantMapper> GrantCopier for Kept<P> {
    fn copy(&self, ops: &mut [CopyOp<'_>]) {
        let mut pages = self.pages.borrow_mut();
        for op in ops {
            let (key, access) = ((op.domain, op.gref), access(op));
            if !in_page(op) {
                op.status = GrantStatus::BadCopyArgument;
                continue;
            }
            if let Some(page) = pages.find(key, access) {
                through(page, op);
                continue;
            }
            // By itself, so that it can be unmapped by itself.
            match self.mapper.map(op.domain, &[op.gref], access) {
                Ok(page) => {
                    through(&page, op);
                    pages.insert(key, page, access == Access::ReadWrite);
                }
                Err(status) => op.status = status,
            }
        }
    }
}

impl<M> Pages<M> {
    fn find(&mut self, key: (DomId, GrantRef), access: Access) -> Option<&M> {
        let slot = self.slots.get_mut(*self.places.get(&key)?)?;
        slot.used = true;
        (slot.writable || access == Access::ReadOnly).then_some(&slot.page)
    }

    fn insert(&mut self, key: (DomId, GrantRef), page: M, writable: bool) {
        // Mapped before, and not for writing.
        self.remove(key);
        if self.slots.len() >= self.most
            && let Some(key) = self.oldest()
        {
            self.remove(key);
        }
        self.places.insert(key, self.slots.len());
        self.slots.push(Slot { key, page, writable, used: true });
    }

    fn remove(&mut self, key: (DomId, GrantRef)) {
        let Some(at) = self.places.remove(&key) else { return };
        self.slots.swap_remove(at);
        if let Some(moved) = self.slots.get(at) {
            self.places.insert(moved.key, at);
        }
    }

    /// The first slot from the hand on that was not used since the hand last came by.
    fn oldest(&mut self) -> Option<(DomId, GrantRef)> {
        loop {
            if self.hand >= self.slots.len() {
                self.hand = 0;
            }
            let slot = self.slots.get_mut(self.hand)?;
            // Ends after one round at most: that clears every mark.
            if !core::mem::take(&mut slot.used) {
                return Some(slot.key);
            }
            self.hand = self.hand.saturating_add(1);
        }
    }
}

impl<P: GrantMapper> fmt::Debug for Kept<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kept").field("pages", &self.len()).finish_non_exhaustive()
    }
}
