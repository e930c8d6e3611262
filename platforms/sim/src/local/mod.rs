//! Domains in one address space: the smallest platform there is.
//!
//! | module | holds |
//! |---|---|
//! | this | [`LocalMachine`] and [`LocalDomain`]: making domains, ending them, counting what they hold |
//! | [`memory`] | pages, grants (a real version 1 table for each domain), mappings, copies |
//! | [`events`] | event channels (real pending and mask bits for each domain) |
//! | [`watched`] | a domain whose every step is told of first, for tests that end it at each |
//!
//! A domain's memory is heap pages; granting writes its grant table, mapping and copying go through
//! that table as a hypervisor would, so a device that mishandles grants fails here as it would on
//! Xen. Everything is `Send + Sync`. What it does not have: a way to wait for an event (poll with
//! `take`), and mapping pages contiguously that do not lie contiguously in their owner's memory.
//!
//! ```
//! use pvio_grant_table::{Access, DomId, GrantMapper, Granter};
//! use pvio_ring::shm::Region;
//! use pvio_sim::LocalMachine;
//!
//! let machine = LocalMachine::new();
//! let (front, back) = (machine.domain(DomId(5)), machine.domain(DomId(0)));
//!
//! let pages = front.alloc_pages(1)?;
//! let gref = front.grant(DomId(0), &pages, 0, Access::ReadWrite)?;
//! let mapped = back.map(DomId(5), &[gref], Access::ReadWrite)?;
//! mapped.write_bytes(0, b"split").unwrap();
//! assert_eq!((front.pages_granted(), back.pages_mapped()), (1, 1));
//!
//! assert!(front.end_access(gref).is_err(), "still mapped");
//! drop(mapped);
//! front.end_access(gref)?;
//! assert_eq!((front.pages_granted(), back.pages_mapped()), (0, 0));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod events;
pub mod memory;
pub mod watched;

#[cfg(test)]
mod tests;

use events::Ports;
use memory::Memory;
use pvio_grant_table::DomId;
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// A machine: a set of domains that can reach each other. Clones are the same machine.
#[derive(Clone, Default, Debug)]
pub struct LocalMachine(Arc<Machine>);

/// A domain, and the platform of whatever runs in it. Clones are the same domain.
#[derive(Clone)]
pub struct LocalDomain {
    machine: LocalMachine,
    state: Arc<State>,
}

#[derive(Default)]
struct Machine {
    domains: RwLock<HashMap<DomId, Arc<State>>>,
    /// Every port of every domain: binding changes two domains at once.
    ports: Mutex<Ports>,
}

/// What the hypervisor keeps of a domain.
struct State {
    id: DomId,
    alive: AtomicBool,
    memory: Memory,
    events: events::Bits,
    events_sent: AtomicU64,
    mapped: AtomicU64,
}

impl LocalMachine {
    /// A machine without domains.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The domain of this number; made if there is none.
    ///
    /// # Panics
    /// When `id` is not a number a domain can have.
    #[must_use]
    pub fn domain(&self, id: DomId) -> LocalDomain {
        assert!(id.is_real(), "domain {id} cannot exist");
        let mut domains = self.0.domains.write().unwrap_or_else(PoisonError::into_inner);
        let state = domains.entry(id).or_insert_with(|| Arc::new(State::new(id)));
        LocalDomain { machine: self.clone(), state: Arc::clone(state) }
    }

    /// Ends a domain at once, as a crash does: it can be neither mapped nor copied from any more,
    /// its event channels close, and what it had mapped counts as unmapped, so that others can
    /// take their grants back. Mappings of its own pages stay readable to whoever holds them, as
    /// on Xen, where a dying domain's pages live until the last mapping is gone.
    ///
    /// The number may be used for a new domain afterwards.
    pub fn kill(&self, id: DomId) {
        let gone = self.0.domains.write().unwrap_or_else(PoisonError::into_inner).remove(&id);
        let Some(gone) = gone else { return };
        gone.alive.store(false, Ordering::SeqCst);
        lock(&self.0.ports).close_all(id);
        for other in self.0.domains.read().unwrap_or_else(PoisonError::into_inner).values() {
            other.memory.forget_user(&gone);
        }
        gone.mapped.store(0, Ordering::SeqCst);
    }

    fn find(&self, id: DomId) -> Option<Arc<State>> {
        self.0.domains.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }
}

impl LocalDomain {
    /// Its number.
    #[must_use]
    pub fn id(&self) -> DomId {
        self.state.id
    }

    /// Whether it was not [killed](LocalMachine::kill).
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.state.alive.load(Ordering::SeqCst)
    }

    /// Pages it has allocated and not freed.
    #[must_use]
    pub fn pages_allocated(&self) -> usize {
        self.state.memory.allocated()
    }

    /// Grants it has given and not taken back.
    #[must_use]
    pub fn pages_granted(&self) -> usize {
        self.state.memory.granted()
    }

    /// Pages of others it has mapped now.
    #[must_use]
    pub fn pages_mapped(&self) -> usize {
        usize::try_from(self.state.mapped.load(Ordering::SeqCst)).unwrap_or(usize::MAX)
    }

    /// Events it has sent since it was made.
    #[must_use]
    pub fn events_sent(&self) -> u64 {
        self.state.events_sent.load(Ordering::Relaxed)
    }

    /// Event channel ends it holds.
    #[must_use]
    pub fn ports_open(&self) -> usize {
        lock(&self.machine.0.ports).open(self.state.id)
    }
}

impl State {
    fn new(id: DomId) -> Self {
        Self {
            id,
            alive: AtomicBool::new(true),
            memory: Memory::default(),
            events: events::bits(),
            events_sent: AtomicU64::new(0),
            mapped: AtomicU64::new(0),
        }
    }
}

impl fmt::Debug for LocalDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LocalDomain({})", self.state.id)
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Machine")
    }
}

/// A panic of another test thread while it held the lock changes nothing for this one: every
/// critical section leaves the tables whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
