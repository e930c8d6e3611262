use super::{Keep, access, in_page, through};
use crate::{Access, CopyOp, DomId, GrantCopier, GrantMapper, GrantRef, GrantStatus};
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

/// Copies by mapping, and keeps what it has mapped, up to a number of pages: one that was not used
/// for long (by the clock algorithm) goes when another is needed. What it keeps is unmapped
/// when it is dropped.
///
/// Only for peers whose [grants stay](GrantsStay).
pub struct CachedMappings<P: GrantMapper> {
    mapper: P,
    /// Its time counts rounds in which every page was used.
    pages: RefCell<Keep<Page<P::Mapping>>>,
}

struct Page<M> {
    mapping: M,
    writable: bool,
}

impl<P: GrantMapper> CachedMappings<P> {
    /// Copies by what `mapper` maps, keeping up to `most` pages, at least 1.
    #[must_use]
    pub fn new(mapper: P, most: usize, _promise: GrantsStay) -> Self {
        let mut pages = Keep::new(most.max(1));
        // Before it there is a round to have been used in last.
        pages.set_now(1);
        Self { mapper, pages: RefCell::new(pages) }
    }

    /// How many pages are mapped now.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages.borrow().len()
    }

    /// Whether nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Unmaps a page: the peer takes its grant back.
    pub fn forget(&self, domain: DomId, gref: GrantRef) {
        self.pages.borrow_mut().remove(domain, gref);
    }
}

impl<P: GrantMapper> GrantCopier for CachedMappings<P> {
    fn copy(&self, ops: &mut [CopyOp<'_>]) {
        let mut pages = self.pages.borrow_mut();
        for op in ops {
            let access = access(op);
            if !in_page(op) {
                op.status = GrantStatus::BadCopyArgument;
                continue;
            }
            let fits = |page: &&mut Page<_>| page.writable || access == Access::ReadOnly;
            if let Some(page) = pages.get(op.domain, op.gref).filter(fits) {
                through(&page.mapping, op);
                continue;
            }
            // By itself, so that it can be unmapped by itself.
            match self.mapper.map(op.domain, &[op.gref], access) {
                Ok(mapping) => {
                    through(&mapping, op);
                    // Mapped before, and not for writing.
                    pages.remove(op.domain, op.gref);
                    make_room(&mut pages);
                    let page = Page { mapping, writable: access == Access::ReadWrite };
                    let _ = pages.insert(op.domain, op.gref, page);
                }
                Err(status) => op.status = status,
            }
        }
    }
}

/// Gives up a page that was not used in this round; if there is none, a new one begins.
fn make_room<T>(pages: &mut Keep<T>) {
    if !pages.is_full() {
        return;
    }
    let round = pages.now();
    if pages.retire(round.saturating_sub(1), 1, |_| true) == 0 {
        pages.set_now(round.saturating_add(1));
        pages.retire(round, 1, |_| true);
    }
}

impl<P: GrantMapper> fmt::Debug for CachedMappings<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CachedMappings").field("pages", &self.len()).finish_non_exhaustive()
    }
}
