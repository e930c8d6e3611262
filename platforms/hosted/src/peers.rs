//! The memory of other domains, as this one uses it: mapped whole, once, and then pinned page by
//! page through the grant table in it. Here the using domain does by itself what on Xen the
//! hypervisor does for it.

use crate::connection::Connection;
use crate::layout::{Frames, Memory, map_memory};
use crate::pages::{OwnMemory, lock};
use crate::protocol::{Request, Status};
use core::cell::RefCell;
use core::hint::spin_loop;
use core::ops::Deref;
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use crossbeam_utils::CachePadded;
use pvio_grant_table::{Access, DomId, GrantRef, GrantStatus};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, Weak};

/// Another domain's memory.
#[derive(Debug)]
pub(crate) struct Peer {
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
    const LOCKED: u32 = u32::MAX;
    const MOST: u32 = Self::LOCKED - 1;

    #[inline]
    fn lock(&self) -> u32 {
        let mut tries = 0_u32;
        loop {
            // One plain exchange; whoever finds it locked puts back what was there.
            let count = self.0.swap(Self::LOCKED, Ordering::Acquire);
            if count != Self::LOCKED {
                return count;
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

/// One of several references to the same peer. Each counts by itself who holds it, in a cache line
/// of its own, so that threads that map pages of one peer do not meet at one counter.
#[derive(Debug)]
pub(crate) struct PeerMemory(CachePadded<Arc<Peer>>);

impl Deref for PeerMemory {
    type Target = Peer;

    #[inline]
    fn deref(&self) -> &Peer {
        &self.0
    }
}

/// Shares of a peer; threads take turns.
const SHARES: usize = 8;

/// Peers that a thread remembers; of those that fall on the same place, the last.
const REMEMBERED: usize = 64;

/// What a thread remembers: whose peer it was, and a share of it that keeps nothing alive.
#[derive(Debug)]
struct Memo {
    peers: u64,
    domain: u16,
    share: Weak<PeerMemory>,
}

impl Memo {
    const NOTHING: Self = Self { peers: 0, domain: 0, share: Weak::new() };
}

static NEXT_PEERS: AtomicU64 = AtomicU64::new(1);
static NEXT_THREAD: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static THREAD: usize = NEXT_THREAD.fetch_add(1, Ordering::Relaxed);
    static MEMO: [RefCell<Memo>; REMEMBERED] = const { [const { RefCell::new(Memo::NOTHING) }; _] };
}

/// Every domain whose memory this one has mapped.
#[derive(Debug)]
pub(crate) struct Peers {
    /// No two in this process have the same.
    number: u64,
    user: DomId,
    own: Arc<OwnMemory>,
    known: Mutex<BTreeMap<u16, [Arc<PeerMemory>; SHARES]>>,
}

impl Peers {
    pub(crate) fn new(user: DomId, own: Arc<OwnMemory>) -> Self {
        let number = NEXT_PEERS.fetch_add(1, Ordering::Relaxed);
        Self { number, user, own, known: Mutex::default() }
    }

    /// A domain's memory; mapped now if it is not yet. Asks nobody and takes no lock if this
    /// thread used it before.
    #[inline]
    pub(crate) fn get(
        self: &Arc<Self>,
        domain: DomId,
        connection: &Arc<Connection>,
    ) -> Result<Arc<PeerMemory>, GrantStatus> {
        if self.own.memory.dead() {
            return Err(GrantStatus::GeneralError);
        }
        match self.remembered(domain) {
            Some(share) if !share.memory.dead() => Ok(share),
            _ => self.look_up(domain, connection),
        }
    }

    #[inline]
    fn remembered(&self, domain: DomId) -> Option<Arc<PeerMemory>> {
        let place = usize::from(domain.0) % REMEMBERED;
        let recall = |memo: &[RefCell<Memo>; REMEMBERED]| {
            let memo = memo.get(place)?.try_borrow().ok()?;
            let same = memo.peers == self.number && memo.domain == domain.0;
            same.then(|| memo.share.upgrade()).flatten()
        };
        // A thread that is ending remembers nothing.
        MEMO.try_with(recall).ok().flatten()
    }

    fn remember(&self, domain: DomId, share: &Arc<PeerMemory>) {
        let place = usize::from(domain.0) % REMEMBERED;
        let now = Memo { peers: self.number, domain: domain.0, share: Arc::downgrade(share) };
        let _ = MEMO.try_with(|memo| memo.get(place).map(|memo| memo.replace(now)));
    }

    #[cold]
    fn look_up(
        self: &Arc<Self>,
        domain: DomId,
        connection: &Arc<Connection>,
    ) -> Result<Arc<PeerMemory>, GrantStatus> {
        let mut known = lock(&self.known);
        let living = known.get(&domain.0).filter(|shares| !shares[0].memory.dead());
        let (shares, dead) = match living {
            Some(shares) => (shares.clone(), Vec::new()),
            None => {
                let peer = Arc::new(self.fetch(domain, connection)?);
                let share = |_| Arc::new(PeerMemory(CachePadded::new(Arc::clone(&peer))));
                let shares = std::array::from_fn(share);
                let dead = take_dead(&mut known);
                known.insert(domain.0, shares.clone());
                (shares, dead)
            }
        };
        drop(known);
        drop(dead);
        let thread = THREAD.try_with(|thread| *thread).unwrap_or(0);
        let share = Arc::clone(&shares[thread % SHARES]);
        self.remember(domain, &share);
        Ok(share)
    }

    fn fetch(
        self: &Arc<Self>,
        domain: DomId,
        connection: &Arc<Connection>,
    ) -> Result<Peer, GrantStatus> {
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
        Ok(Peer {
            memory,
            file,
            uses: std::iter::repeat_with(Uses::default).take(frames.entries() as usize).collect(),
            user: self.user,
            own: Arc::clone(&self.own),
            others: Arc::downgrade(self),
            _alive: Arc::clone(connection),
        })
    }

    #[cold]
    fn forget_dead(&self) {
        // Dropped only when the lock is given back: unmapping is slow.
        let _dead = take_dead(&mut lock(&self.known));
    }
}

fn take_dead(
    known: &mut BTreeMap<u16, [Arc<PeerMemory>; SHARES]>,
) -> Vec<[Arc<PeerMemory>; SHARES]> {
    known.extract_if(.., |_, shares| shares[0].memory.dead()).map(|(_, shares)| shares).collect()
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
