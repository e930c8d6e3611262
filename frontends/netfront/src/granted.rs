//! Pages that stay granted as a whole while they are in use.

use alloc::vec::Vec;
use pvio_grant_table::{Access, DomId, GrantError, GrantRef, Granter};

/// This domain's pages, all granted to the backend.
pub struct Granted<P: Granter> {
    platform: P,
    pages: P::Pages,
    grefs: Vec<GrantRef>,
}

impl<P: Granter> Granted<P> {
    pub fn new(
        platform: P,
        backend: DomId,
        count: usize,
        access: Access,
    ) -> Result<Self, GrantError> {
        let pages = platform.alloc_pages(count)?;
        let mut granted = Self { platform, pages, grefs: Vec::with_capacity(count) };
        for page in 0..count {
            // If a grant fails, `drop` revokes the earlier ones.
            let gref = granted.platform.grant(backend, &granted.pages, page, access)?;
            granted.grefs.push(gref);
        }
        Ok(granted)
    }

    #[inline]
    pub fn pages(&self) -> &P::Pages {
        &self.pages
    }

    /// Returns the grant reference of a page.
    #[inline]
    pub fn gref(&self, page: usize) -> GrantRef {
        self.grefs.get(page).copied().unwrap_or_default()
    }

    /// Returns the grant references of all pages, in order.
    pub fn grefs(&self) -> &[GrantRef] {
        &self.grefs
    }

    /// Ends the grants that are not in use, and returns whether none is left. The pages are not
    /// used for packets afterwards.
    pub fn revoke(&mut self) -> bool {
        let platform = &self.platform;
        self.grefs.retain(|gref| platform.end_access(*gref).is_err());
        self.grefs.is_empty()
    }
}

impl<P: Granter> Drop for Granted<P> {
    /// Revokes all grants. Memory that the backend has still mapped is never freed: it must not be
    /// reused while another domain can access it (XSA-396).
    fn drop(&mut self) {
        if !self.revoke() {
            core::mem::forget(self.pages.clone());
        }
    }
}
