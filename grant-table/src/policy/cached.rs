use super::{GrantCache, access, in_page, through};
use crate::{Access, CopyOp, DomId, GrantCopier, GrantMapper, GrantRef, GrantStatus};
use core::cell::RefCell;
use core::fmt;

/// **The peer's promise that its grants persist**: during the session it neither ends access to a
/// grant that it has used once, nor reuses the reference for another page.
///
/// A peer has promised this only if the protocol defines it and it was negotiated: for example
/// blkif's `feature-persistent`, or netif's staging grants
/// (`XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING`). **Linux's netfront, like nearly every other, does not
/// promise it**: it grants a page for one packet, and soon reuses the reference for another page. A
/// cached mapping for such a peer refers to a page that the peer believes is no longer shared. The
/// backend would read packets from it that the peer never sent, and overwrite whatever the peer
/// stores there now. This does not endanger the backend's memory, but all of the peer's data.
///
/// So there is no default and no conversion: the code that constructs a value has checked the
/// negotiation.
#[derive(Clone, Copy, Debug)]
pub struct GrantsStay(());

impl GrantsStay {
    /// Must be called only if the negotiated features include the peer's promise.
    #[must_use]
    pub const fn promised_by_the_peer() -> Self {
        Self(())
    }
}

/// Copies through mappings that are cached, up to a number of pages. If the cache is full, a
/// mapping that was not used recently is evicted (clock algorithm). Dropping the value unmaps all
/// pages.
///
/// Only for peers with [persistent grants](GrantsStay).
pub struct CachedMappings<P: GrantMapper> {
    mapper: P,
    /// The cache's time counts rounds of the clock algorithm.
    pages: RefCell<GrantCache<Page<P::Mapping>>>,
}

struct Page<M> {
    mapping: M,
    writable: bool,
}

impl<P: GrantMapper> CachedMappings<P> {
    /// Copies through mappings made by `mapper`, and caches up to `most` of them, at least 1.
    #[must_use]
    pub fn new(mapper: P, most: usize, _promise: GrantsStay) -> Self {
        let mut pages = GrantCache::new(most.max(1));
        // Starts at 1: the round before the first one is 0, and no entry was used in it.
        pages.set_now(1);
        Self { mapper, pages: RefCell::new(pages) }
    }

    /// Returns the number of cached mappings.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages.borrow().len()
    }

    /// Returns whether nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Unmaps a page whose grant the peer revokes.
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
            // Mapped separately, so that it can be unmapped separately.
            match self.mapper.map(op.domain, &[op.gref], access) {
                Ok(mapping) => {
                    through(&mapping, op);
                    // Replaces a read-only mapping of the page, if there is one.
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

/// Evicts a page that was not used in this round; if there is none, starts a new round.
fn make_room<T>(pages: &mut GrantCache<T>) {
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
