//! Domains in one address space: a minimal platform.
//!
//! | module | contents |
//! |---|---|
//! | this | [`LocalMachine`] and [`LocalDomain`]: create and kill domains, count their resources |
//! | [`memory`] | pages, grants (a real version 1 table for each domain), mappings, copies |
//! | [`events`] | event channels (real pending and mask bits for each domain) |
//!
//! A domain's memory is heap pages. Granting writes its grant table. Mapping and copying use that
//! table as a hypervisor would, so a device that uses grants incorrectly fails here as on Xen.
//! Everything is `Send + Sync`. Two things are not supported: waiting for an event (poll with
//! `take`), and contiguous mappings of pages that are not contiguous in their owner's memory.
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

#[cfg(test)]
mod tests;

use events::Ports;
use memory::Memory;
use pvio_grant_table::DomId;
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// Machine: a set of domains that can access each other. Clones refer to the same machine.
#[derive(Clone, Default, Debug)]
pub struct LocalMachine(Arc<Machine>);

/// Domain, and the platform of the code that runs in it. Clones refer to the same domain.
#[derive(Clone)]
pub struct LocalDomain {
    machine: LocalMachine,
    state: Arc<State>,
}

#[derive(Default)]
struct Machine {
    domains: RwLock<HashMap<DomId, Arc<State>>>,
    /// Ports of all domains under one lock: binding changes two domains atomically.
    ports: Mutex<Ports>,
}

/// State of a domain, from the hypervisor's view.
struct State {
    id: DomId,
    alive: AtomicBool,
    memory: Memory,
    events: events::Bits,
    events_sent: AtomicU64,
    mapped: AtomicU64,
}

impl LocalMachine {
    /// Returns a machine without domains.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the domain with this id, which is created if it does not exist.
    ///
    /// # Panics
    /// If `id` is not a valid domain id.
    #[must_use]
    pub fn domain(&self, id: DomId) -> LocalDomain {
        assert!(id.is_real(), "domain {id} cannot exist");
        let mut domains = self.0.domains.write().unwrap_or_else(PoisonError::into_inner);
        let state = domains.entry(id).or_insert_with(|| Arc::new(State::new(id)));
        LocalDomain { machine: self.clone(), state: Arc::clone(state) }
    }

    /// Destroys a domain immediately, as a crash does. It can no longer be mapped or copied from,
    /// its event channels are closed, and its mappings count as unmapped, so that other domains can
    /// end their grants. Existing mappings of its pages stay readable, as on Xen, where the pages
    /// of a dying domain exist until the last mapping is removed.
    ///
    /// The id may be used for a new domain afterwards.
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
    /// Returns its domain id.
    #[must_use]
    pub fn id(&self) -> DomId {
        self.state.id
    }

    /// Whether it has not been [killed](LocalMachine::kill).
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.state.alive.load(Ordering::SeqCst)
    }

    /// Returns the number of allocated pages.
    #[must_use]
    pub fn pages_allocated(&self) -> usize {
        self.state.memory.allocated()
    }

    /// Returns the number of active grants.
    #[must_use]
    pub fn pages_granted(&self) -> usize {
        self.state.memory.granted()
    }

    /// Returns the number of pages of other domains that it has mapped.
    #[must_use]
    pub fn pages_mapped(&self) -> usize {
        usize::try_from(self.state.mapped.load(Ordering::SeqCst)).unwrap_or(usize::MAX)
    }

    /// Returns the number of events that it has sent.
    #[must_use]
    pub fn events_sent(&self) -> u64 {
        self.state.events_sent.load(Ordering::Relaxed)
    }

    /// Returns the number of open ends of event channels.
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

/// A panic of another test thread that held the lock has no effect on this one: every critical
/// section leaves the tables consistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
