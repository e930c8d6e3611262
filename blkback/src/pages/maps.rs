//! Mapping of guest pages, for one request or for the cache.

use super::request::PageRequest;
use super::{Buf, Context, Pages};
use crate::engine::Segments;
use pvio_grant_table::{Access, GrantMapper};
use pvio_ring::shm::{Either, SharedMemory};

impl<M: SharedMemory> Pages<M> {
    /// Maps the pages of one request with one call. Returns whether the host had the resources; if
    /// not, none is mapped.
    pub(super) fn map_request<P>(
        &mut self,
        context: Context<'_, P>,
        requests: &[PageRequest],
        out: &mut Segments<Buf<M>>,
    ) -> bool
    where
        P: GrantMapper<Mapping = M>,
    {
        let Some(first) = requests.first() else { return true };
        let (before, mut exhausted) = (out.len(), false);
        self.grefs.clear();
        self.grefs.extend(requests.iter().map(|request| request.segment.gref));
        context.map_each(&self.grefs, first.access(), &mut |i, mapped| {
            exhausted |= mapped.as_ref().is_err_and(|status| status.is_exhaustion());
            if let (Ok(page), Some(request)) = (mapped, requests.get(i)) {
                out.push(request.io_seg(Either::A(page)));
            }
        });
        if exhausted {
            out.truncate(before);
        }
        !exhausted
    }

    /// Maps the pages of one request that are not cached, with one call. Returns whether the host
    /// had the resources; if not, none of them is mapped.
    pub(super) fn map_uncached<P>(
        &mut self,
        context: Context<'_, P>,
        requests: &[PageRequest],
        buffers: &mut [Option<Buf<M>>],
    ) -> bool
    where
        P: GrantMapper<Mapping = M>,
    {
        let uncached = requests.iter().filter(|request| request.uncached);
        self.grefs.clear();
        self.grefs.extend(uncached.map(|request| request.segment.gref));
        let Some(first) = requests.first().filter(|_| !self.grefs.is_empty()) else {
            return true;
        };
        let mut exhausted = false;
        let mut uncached = requests.iter().zip(&mut *buffers).filter(|(page, _)| page.uncached);
        // The callback receives them in order.
        context.map_each(&self.grefs, first.access(), &mut |_, mapped| {
            exhausted |= mapped.as_ref().is_err_and(|status| status.is_exhaustion());
            if let Some((_, buf)) = uncached.next() {
                *buf = mapped.ok().map(Either::A);
            }
        });
        if exhausted {
            let uncached = requests.iter().zip(buffers).filter(|(page, _)| page.uncached);
            uncached.for_each(|(_, buf)| *buf = None);
        }
        !exhausted
    }

    /// Looks up cached mappings, and maps and caches further pages while there is room in the
    /// cache, in the budget and on the host.
    pub(super) fn find_or_cache<P>(
        &mut self,
        context: Context<'_, P>,
        requests: &mut [PageRequest],
        buffers: &mut [Option<Buf<M>>],
    ) where
        P: GrantMapper<Mapping = M>,
    {
        let Context { frontend, stats, .. } = context;
        let cached = &mut self.cached;
        let (mut mapped, mut reused, mut unmappable) = (0, 0, 0);
        for (request, buf) in requests.iter_mut().zip(buffers) {
            let gref = request.segment.gref;
            request.uncached = false;
            if let Some(page) = cached.get(frontend, gref) {
                reused += 1;
                *buf = Some(Either::B(Either::A(page)));
            } else if let Some(room) = cached.room() {
                mapped += 1;
                // Mapped writable as well: the next request that uses the page may read from the
                // disk.
                match context.map(gref, Access::ReadWrite) {
                    Ok(page) => *buf = Some(cached.insert(frontend, gref, page, room)),
                    Err(status) => {
                        request.uncached = status.is_exhaustion();
                        unmappable += u64::from(request.uncached);
                    }
                }
            } else {
                request.uncached = true;
            }
        }
        stats.mapped_pages.add(mapped);
        stats.reused_pages.add(reused);
        stats.unmappable_pages.add(unmappable);
    }
}
