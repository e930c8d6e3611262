//! Pages of our own, and whose data each holds.

use alloc::vec::Vec;
use pvio_grant_table::GrantRef;
use pvio_ring::shm::PrivatePage;

/// The private pages of one queue.
#[derive(Debug, Default)]
pub(super) struct Pool {
    free: Vec<PrivatePage>,
    /// By a page's number: which page of the guest's it stands for.
    grefs: Vec<GrantRef>,
}

impl Pool {
    /// As many pages, all free. The system gives memory only for those that are used.
    pub fn new(count: usize) -> Self {
        if count == 0 {
            return Self::default();
        }
        let mut free: Vec<PrivatePage> = PrivatePage::pool(count).collect();
        // The last one put back is the first one taken, in the cache still; at first, page 0.
        free.reverse();
        Self { free, grefs: (0..count).map(|_| GrantRef::default()).collect() }
    }

    /// A page to stand for one of the guest's.
    pub fn take(&mut self, gref: GrantRef) -> Option<PrivatePage> {
        let page = self.free.pop()?;
        *self.grefs.get_mut(page.number())? = gref;
        Some(page)
    }

    /// Which page of the guest's a page stands for.
    pub fn gref(&self, page: &PrivatePage) -> GrantRef {
        self.grefs.get(page.number()).copied().unwrap_or_default()
    }

    pub fn give_back(&mut self, page: PrivatePage) {
        self.free.push(page);
    }
}
