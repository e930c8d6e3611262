//! The memory of other domains, as this one uses it: mapped whole, once, and then pinned page by
//! page through the grant table in it. Here the using domain does by itself what on Xen the
//! hypervisor does for it.

use crate::connection::Connection;
use crate::layout::{Frames, Memory, map_memory};
use crate::pages::{OwnMemory, lock};
use crate::protocol::{Request, Status};
use arc_swap::ArcSwap;
use core::hint::spin_loop;
use core::sync::atomic::{AtomicU32, Ordering};
use pvio_grant_table::{Access, DomId, GrantRef, GrantStatus};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, Weak};

/// Another domain's memory.
#[derive(Debug)]
pub(crate) struct Peer {
    domain: DomId,
    pub(crate) memory: Memory,
    pub(crate) file: OwnedFd,
    uses: Box<[Uses]>,
    user: DomId,
    own: Arc<OwnMemory>,
    others: Weak<Peers>,
    /// As long as anything of the peer's is mapped, this domain lives: were it taken for dead, the
    /// peer would reuse the page.
    _alive: Arc<Connection>,
}

impl Peer {
    /// Marks a page in use and returns its frame, one that can be shared.
    #[inline]
    pub(crate) fn pin(&self, gref: GrantRef, access: Access) -> Result<u32, GrantStatus> {
        let uses = self.uses.get(gref.0 as usize).ok_or(GrantStatus::BadGrantRef)?;
        let count = uses.lock();
        let pinned = self.pin_locked(gref, access, count);
        uses.unlock(count + u32::from(pinned.is_ok()));
        pinned
    }

    fn pin_locked(&self, gref: GrantRef, access: Access, count: u32) -> Result<u32, GrantStatus> {
        if count == Uses::MOST {
            return Err(GrantStatus::NoSpace);
        }
        let table = self.memory.table();
        let frame = table.pin(gref, self.user, access)?;
        if self.memory.frames.sharable(frame) {
            return Ok(frame);
        }
        if count == 0 {
            table.unpin(gref, Access::ReadWrite);
        }
        Err(GrantStatus::BadPage)
    }

    /// Undoes one `pin`. The marks stay until the last use ends.
    #[inline]
    pub(crate) fn unpin(&self, gref: GrantRef) {
        let Some(uses) = self.uses.get(gref.0 as usize) else { return };
        let count = uses.lock();
        // Once this domain was destroyed the marks are no longer its own.
        if count == 1 && !self.own.memory.dead() {
            self.memory.table().unpin(gref, Access::ReadWrite);
        }
        uses.unlock(count.saturating_sub(1));
    }

    /// A use of a page ended. If its domain is gone there will be no other: the memory goes with
    /// the last user.
    #[inline]
    pub(crate) fn used(&self) {
        if self.memory.dead()
            && let Some(others) = self.others.upgrade()
        {
            others.forget_dead();
        }
    }
}

/// How often one reference is in use in this process. A count and a lock in one word, so that
/// marks in the grant table and count change together; the lock is held for two loads and an
/// exchange, and contended only when two threads use the same page at the same time.
#[derive(Debug, Default)]
struct Uses(AtomicU32);

impl Uses {
    const LOCKED: u32 = 1 << 31;
    const MOST: u32 = Self::LOCKED - 1;

    #[inline]
    fn lock(&self) -> u32 {
        let mut tries = 0_u32;
        loop {
            let before = self.0.fetch_or(Self::LOCKED, Ordering::Acquire);
            if before & Self::LOCKED == 0 {
                return before;
            }
            // The holder may have been preempted.
            tries += 1;
            if tries.is_multiple_of(64) {
                std::thread::yield_now();
            }
            spin_loop();
        }
    }

    #[inline]
    fn unlock(&self, count: u32) {
        self.0.store(count, Ordering::Release);
    }
}

/// Every domain whose memory this one has mapped, by number.
#[derive(Debug)]
pub(crate) struct Peers {
    user: DomId,
    own: Arc<OwnMemory>,
    known: ArcSwap<Vec<Arc<Peer>>>,
    changing: Mutex<()>,
}

impl Peers {
    pub(crate) fn new(user: DomId, own: Arc<OwnMemory>) -> Self {
        Self { user, own, known: ArcSwap::default(), changing: Mutex::new(()) }
    }

    /// A domain's memory; mapped now if it is not yet. Asks nobody and takes no lock when it is.
    #[inline]
    pub(crate) fn get(
        self: &Arc<Self>,
        domain: DomId,
        connection: &Arc<Connection>,
    ) -> Result<Arc<Peer>, GrantStatus> {
        match self.find(domain) {
            Some(peer) if !self.own.memory.dead() => Ok(peer),
            Some(_) => Err(GrantStatus::GeneralError),
            None => self.fetch(domain, connection),
        }
    }

    #[inline]
    fn find(&self, domain: DomId) -> Option<Arc<Peer>> {
        let known = self.known.load();
        let at = known.binary_search_by_key(&domain.0, |peer| peer.domain.0).ok()?;
        let peer = known.get(at)?;
        (!peer.memory.dead()).then(|| Arc::clone(peer))
    }

    #[cold]
    fn fetch(
        self: &Arc<Self>,
        domain: DomId,
        connection: &Arc<Connection>,
    ) -> Result<Arc<Peer>, GrantStatus> {
        let changing = lock(&self.changing);
        if let Some(peer) = self.find(domain) {
            return Ok(peer);
        }
        let asked = connection.call::<1>(Request::Memory(domain));
        let (reply, fds) = asked.map_err(|_| GrantStatus::GeneralError)?;
        let Some([file]) = fds else {
            return Err(match reply.status {
                Status::NoDomain => GrantStatus::BadDomain,
                Status::NothingGranted => GrantStatus::BadGrantRef,
                _ => GrantStatus::GeneralError,
            });
        };
        let [total, grant] = reply.results;
        let frames = Frames::from_wire(total, grant).ok_or(GrantStatus::GeneralError)?;
        let memory = map_memory(&file, frames).map_err(|_| GrantStatus::NoSpace)?;
        let peer = Arc::new(Peer {
            domain,
            memory,
            file,
            uses: std::iter::repeat_with(Uses::default).take(frames.entries() as usize).collect(),
            user: self.user,
            own: Arc::clone(&self.own),
            others: Arc::downgrade(self),
            _alive: Arc::clone(connection),
        });
        let mut next = self.living();
        next.push(Arc::clone(&peer));
        next.sort_by_key(|peer| peer.domain.0);
        let old = self.known.swap(Arc::new(next));
        drop(changing);
        drop(old);
        Ok(peer)
    }

    #[cold]
    fn forget_dead(&self) {
        let changing = lock(&self.changing);
        let next = self.living();
        if next.len() < self.known.load().len() {
            let old = self.known.swap(Arc::new(next));
            drop(changing);
            drop(old);
        }
    }

    fn living(&self) -> Vec<Arc<Peer>> {
        self.known.load().iter().filter(|peer| !peer.memory.dead()).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_survive_threads() {
        let uses = Uses::default();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..100_000 {
                        let count = uses.lock();
                        uses.unlock(count + 1);
                    }
                });
            }
        });
        assert_eq!(uses.lock(), 200_000);
    }
}
