//! Pages that are granted whole for as long as they are used.

use alloc::vec::Vec;
use pvio_grant_table::{Access, DomId, GrantError, GrantRef, Granter};

/// Pages of our own, all granted to the backend.
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
            // What was granted before a failure is taken back by `drop`.
            let gref = granted.platform.grant(backend, &granted.pages, page, access)?;
            granted.grefs.push(gref);
        }
        Ok(granted)
    }

    #[inline]
    pub fn pages(&self) -> &P::Pages {
        &self.pages
    }

    /// The reference of a page.
    #[inline]
    pub fn gref(&self, page: usize) -> GrantRef {
        self.grefs.get(page).copied().unwrap_or_default()
    }

    /// The references of all pages, in order.
    pub fn grefs(&self) -> &[GrantRef] {
        &self.grefs
    }

    /// Ends what grants it can, and tells whether none is left. Nothing is sent or received with
    /// the pages any more.
    pub fn revoke(&mut self) -> bool {
        let platform = &self.platform;
        self.grefs.retain(|gref| platform.end_access(*gref).is_err());
        self.grefs.is_empty()
    }
}

impl<P: Granter> Drop for Granted<P> {
    /// Takes every grant back. Memory the backend still has mapped stays allocated for ever: it
    /// must never become something else while another domain can reach it (XSA-396).
    fn drop(&mut self) {
        if !self.revoke() {
            core::mem::forget(self.pages.clone());
        }
    }
}
