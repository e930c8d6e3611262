//! Memory of other domains, as this domain accesses it: each is mapped once as a whole, and then
//! its pages are pinned one by one through its grant table. This process does what the hypervisor
//! does on Xen.

use crate::connection::Connection;
use crate::layout::{Frames, Memory, USES_LOCKED, Uses, map_memory};
use crate::pages::lock;
use crate::protocol::{Request, Status};
use core::cell::RefCell;
use core::ops::Deref;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use crossbeam_utils::CachePadded;
use pvio_grant_table::{Access, DomId, GrantRef, GrantStatus};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, Weak};

/// Memory of another domain.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) memory: Memory,
    pub(crate) file: OwnedFd,
    uses: Uses,
    user: DomId,
    others: Weak<Peers>,
    /// Keeps the connection open while any page of the peer is mapped. Otherwise the hypervisor would
    /// end the use, and the peer would reuse the page.
    _alive: Arc<Connection>,
}

impl Peer {
    /// Marks a page as in use and returns its frame number, which is a sharable one.
    #[inline]
    pub(crate) fn pin(&self, gref: GrantRef, access: Access) -> Result<u32, GrantStatus> {
        let count = self.uses.lock(gref).ok_or(GrantStatus::BadGrantRef)?;
        let pinned = self.pin_locked(gref, access, count);
        self.uses.unlock(gref, count + u32::from(pinned.is_ok()));
        pinned
    }

    fn pin_locked(&self, gref: GrantRef, access: Access, count: u32) -> Result<u32, GrantStatus> {
        if count >= USES_LOCKED - 1 {
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
        let Some(count) = self.uses.lock(gref) else { return };
        // Once the hypervisor has ended the uses of this connection, the marks are not its own.
        if count == 1 && !self.uses.revoked() {
            self.memory.table().unpin(gref, Access::ReadWrite);
        }
        self.uses.unlock(gref, count.saturating_sub(1));
    }

    /// Whether the peer, or this process's connection, no longer exists.
    #[inline]
    pub(crate) fn ended(&self) -> bool {
        self.memory.dead() || self.uses.revoked()
    }

    /// Called after a use of a page has ended. If the peer is destroyed, its memory is released
    /// with the last user.
    #[inline]
    pub(crate) fn used(&self) {
        if self.ended()
            && let Some(others) = self.others.upgrade()
        {
            others.forget_dead();
        }
    }
}

/// One of several references to the same peer. Each has its own reference count in its own cache
/// line, so that threads that map pages of one peer do not contend for one counter.
#[derive(Debug)]
pub(crate) struct PeerMemory(CachePadded<Arc<Peer>>);

impl Deref for PeerMemory {
    type Target = Peer;

    #[inline]
    fn deref(&self) -> &Peer {
        &self.0
    }
}

/// Number of references per peer, which are assigned to threads in turn.
const SHARES: usize = 8;

/// Size of a thread's cache of peers. Peers with the same index replace each other.
const REMEMBERED: usize = 64;

/// Entry of a thread's cache: a peer, and a weak reference to it.
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

/// All domains whose memory this one has mapped.
#[derive(Debug)]
pub(crate) struct Peers {
    /// Unique number within this process.
    number: u64,
    user: DomId,
    known: Mutex<BTreeMap<u16, [Arc<PeerMemory>; SHARES]>>,
}

impl Peers {
    pub(crate) fn new(user: DomId) -> Self {
        let number = NEXT_PEERS.fetch_add(1, Ordering::Relaxed);
        Self { number, user, known: Mutex::default() }
    }

    /// Returns a domain's memory, and maps it if it is not mapped yet. Takes no lock and makes no
    /// request if this thread used it before.
    #[inline]
    pub(crate) fn get(
        self: &Arc<Self>,
        domain: DomId,
        connection: &Arc<Connection>,
    ) -> Result<Arc<PeerMemory>, GrantStatus> {
        match self.remembered(domain) {
            Some(share) if !share.ended() => Ok(share),
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
        // A thread that is ending has no cache.
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
        let living = known.get(&domain.0).filter(|shares| !shares[0].ended());
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
        let asked = connection.call::<2>(&Request::Memory(domain));
        let (reply, fds) = asked.map_err(|_| GrantStatus::GeneralError)?;
        let Some([file, uses]) = fds else {
            return Err(match reply.status {
                Status::NoDomain => GrantStatus::BadDomain,
                Status::NothingGranted => GrantStatus::BadGrantRef,
                Status::Denied => GrantStatus::PermissionDenied,
                _ => GrantStatus::GeneralError,
            });
        };
        let [total, grant] = reply.results;
        let frames = Frames::from_wire(total, grant).ok_or(GrantStatus::GeneralError)?;
        let memory = map_memory(&file, frames).map_err(|_| GrantStatus::NoSpace)?;
        Ok(Peer {
            memory,
            file,
            uses: Uses::map(uses, frames).map_err(|_| GrantStatus::NoSpace)?,
            user: self.user,
            others: Arc::downgrade(self),
            _alive: Arc::clone(connection),
        })
    }

    #[cold]
    fn forget_dead(&self) {
        // Dropped after the lock is released, since unmapping is slow.
        let _dead = take_dead(&mut lock(&self.known));
    }
}

fn take_dead(
    known: &mut BTreeMap<u16, [Arc<PeerMemory>; SHARES]>,
) -> Vec<[Arc<PeerMemory>; SHARES]> {
    known.extract_if(.., |_, shares| shares[0].ended()).map(|(_, shares)| shares).collect()
}
