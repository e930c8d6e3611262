//! Mapping of guest pages, for one request or for the cache.

use super::{Buf, Pages};
use crate::engine::Segments;
use crate::stats::Stats;
use core::ops::Range;
use pvio_grant_table::{Access, DomId, GrantMapper};
use pvio_ring::shm::{Either, SharedMemory};

impl<M: SharedMemory> Pages<M> {
    /// Maps the pages of one request with one call. Returns whether the host had the resources; if
    /// not, none is mapped.
    pub(super) fn map_all<P>(
        &mut self,
        range: Range<usize>,
        grants: &P,
        frontend: DomId,
        stats: &Stats,
        out: &mut Segments<Buf<M>>,
    ) -> bool
    where
        P: GrantMapper<Mapping = M>,
    {
        let wanted = self.wanted.get(range).unwrap_or_default();
        let Some(first) = wanted.first() else { return true };
        let (before, mut exhausted) = (out.len(), false);
        self.grefs.clear();
        self.grefs.extend(wanted.iter().map(|want| want.segment.gref));
        stats.mapped_pages.add(wanted.len() as u64);
        grants.map_each(frontend, &self.grefs, first.access(), &mut |i, mapped| {
            exhausted |= mapped.as_ref().is_err_and(|status| status.is_exhaustion());
            if let (Ok(page), Some(want)) = (mapped, wanted.get(i)) {
                out.push(want.over(Either::A(page)));
            }
        });
        if exhausted {
            out.truncate(before);
        }
        !exhausted
    }

    /// Maps the pages of one request that are not cached, with one call. Returns whether the host
    /// had the resources; if not, none of them is mapped.
    pub(super) fn map_rest<P>(
        &mut self,
        range: Range<usize>,
        grants: &P,
        frontend: DomId,
        stats: &Stats,
    ) -> bool
    where
        P: GrantMapper<Mapping = M>,
    {
        let wanted = self.wanted.get(range.clone()).unwrap_or_default();
        let found = self.found.get_mut(range.clone()).unwrap_or_default();
        let mut beyond = wanted.iter().zip(found).filter(|(want, _)| want.beyond);
        let mut exhausted = false;
        self.grefs.clear();
        self.grefs.extend(wanted.iter().filter(|want| want.beyond).map(|want| want.segment.gref));
        let Some(first) = wanted.first().filter(|_| !self.grefs.is_empty()) else {
            return true;
        };
        stats.mapped_pages.add(self.grefs.len() as u64);
        // The callback receives them in order.
        grants.map_each(frontend, &self.grefs, first.access(), &mut |_, mapped| {
            exhausted |= mapped.as_ref().is_err_and(|status| status.is_exhaustion());
            if let Some((_, buf)) = beyond.next() {
                *buf = mapped.ok().map(Either::A);
            }
        });
        if exhausted {
            let found = self.found.get_mut(range).unwrap_or_default();
            let beyond = wanted.iter().zip(found).filter(|(want, _)| want.beyond);
            beyond.for_each(|(_, buf)| *buf = None);
        }
        !exhausted
    }

    /// Looks up cached mappings, and maps and caches further pages while there is room in the
    /// cache, in the budget and on the host.
    pub(super) fn find_or_keep<P>(&mut self, grants: &P, frontend: DomId, stats: &Stats)
    where
        P: GrantMapper<Mapping = M>,
    {
        let Self { wanted, found, kept, .. } = self;
        let (mut mapped, mut reused, mut unmappable) = (0, 0, 0);
        for (want, buf) in wanted.iter_mut().zip(found.iter_mut()) {
            let gref = want.segment.gref;
            want.beyond = false;
            if let Some(page) = kept.get(frontend, gref) {
                reused += 1;
                *buf = Some(Either::B(Either::A(page)));
            } else if let Some(room) = kept.room() {
                mapped += 1;
                // Mapped writable as well: the next request that uses the page may read from the
                // disk.
                match grants.map(frontend, core::slice::from_ref(&gref), Access::ReadWrite) {
                    Ok(page) => *buf = Some(kept.insert(frontend, gref, page, room)),
                    Err(status) => {
                        want.beyond = status.is_exhaustion();
                        unmappable += u64::from(want.beyond);
                    }
                }
            } else {
                want.beyond = true;
            }
        }
        stats.mapped_pages.add(mapped);
        stats.reused_pages.add(reused);
        stats.unmappable_pages.add(unmappable);
    }
}
