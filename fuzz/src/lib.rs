//! Parts that the fuzz targets share: two simulated domains, and what a peer may do to shared memory.
//!
//! A target is a sequence of actions of a peer (an enum with [`Arbitrary`]), executed one by one against
//! the unchanged device code over the simulator's platform (`pvio_sim::local`). libFuzzer makes the
//! sequences. A target asserts invariants after each action, and at the end that nothing has leaked.

#![forbid(unsafe_code)]

pub mod disk;
pub mod image;
pub mod nic;
pub mod world;

use arbitrary::Arbitrary;
use pvio_event_channel::EventChannels;
use pvio_grant_table::{Access, DomId, GrantRef, Granter};
use pvio_ring::shm::{PAGE_SIZE, Region};
use pvio_sim::local::events::LocalChannel;
use pvio_sim::local::memory::LocalPages;
use pvio_sim::{LocalDomain, LocalMachine};
use std::sync::atomic::Ordering;

/// Domain of the frontend.
pub const FRONT: DomId = DomId(2);
/// Domain of the backend.
pub const BACK: DomId = DomId(1);

/// A machine with the domains of a frontend and a backend.
pub struct Domains {
    /// The machine.
    pub machine: LocalMachine,
    /// The frontend's domain.
    pub front: LocalDomain,
    /// The backend's domain.
    pub back: LocalDomain,
}

impl Default for Domains {
    fn default() -> Self {
        let machine = LocalMachine::new();
        let (front, back) = (machine.domain(FRONT), machine.domain(BACK));
        Self { machine, front, back }
    }
}

impl Domains {
    /// Asserts that the backend has released everything: mappings, ports, pages and grants.
    pub fn assert_backend_is_empty(&self) {
        let back = &self.back;
        let left =
            [back.pages_mapped(), back.ports_open(), back.pages_allocated(), back.pages_granted()];
        assert_eq!(left, [0; 4], "mappings, ports, pages and grants that the backend leaks");
    }

    /// Asserts that the frontend has released everything.
    pub fn assert_frontend_is_empty(&self) {
        let front = &self.front;
        let left = [front.ports_open(), front.pages_allocated(), front.pages_granted()];
        assert_eq!(left, [0; 3], "ports, pages and grants that the frontend leaks");
    }
}

/// Pages of a domain that are granted to another.
pub struct Shared {
    /// The pages.
    pub pages: LocalPages,
    /// Their grants.
    pub grefs: Vec<GrantRef>,
    owner: LocalDomain,
}

impl Shared {
    /// Allocates pages of `owner` and grants them to `to`.
    pub fn new(owner: &LocalDomain, to: DomId, count: usize, access: Access) -> Self {
        let pages = owner.alloc_pages(count).expect("enough memory");
        let grant = |page| owner.grant(to, &pages, page, access).expect("enough grants");
        Self { grefs: (0..count).map(grant).collect(), pages, owner: owner.clone() }
    }

    /// Ends a grant, as a hostile owner may do at any time. It stays if the peer has mapped it.
    pub fn revoke(&mut self, which: u8) {
        if self.grefs.len() > 1 {
            let at = usize::from(which) % self.grefs.len();
            if self.owner.end_access(self.grefs[at]).is_ok() {
                self.grefs.remove(at);
            }
        }
    }

    /// Asserts that the peer has no mapping of these pages.
    pub fn assert_unmapped(self) {
        for gref in self.grefs {
            assert!(self.owner.end_access(gref).is_ok(), "a grant is in use after the end");
        }
    }
}

/// A 32-bit value that a peer writes over another.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Value {
    /// Any value.
    Any(u32),
    /// The present value with a distance: what an index is changed to.
    Near(i8),
}

/// A store to a page of a ring.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Scribble {
    /// One of the indices (`req_prod`, `req_event`, `rsp_prod`, `rsp_event`).
    Index(u8, Value),
    /// Any word.
    Word(u16, Value),
}

impl Scribble {
    /// Writes to `memory`.
    pub fn write(self, memory: &impl Region) {
        let (at, value) = match self {
            Self::Index(at, value) => (usize::from(at % 4), value),
            Self::Word(at, value) => (usize::from(at) % (memory.len() / 4), value),
        };
        let now = memory.load_u32(at * 4, Ordering::Relaxed).expect("inside the memory");
        let value = match value {
            Value::Any(value) => value,
            Value::Near(distance) => now.wrapping_add_signed(distance.into()),
        };
        assert!(memory.store_u32(at * 4, value, Ordering::Release), "inside the memory");
    }
}

/// Writes `bytes` somewhere into `memory`, as far as they fit.
pub fn write_somewhere(memory: &impl Region, at: u16, bytes: &[u8]) {
    let at = usize::from(at) * 8 % memory.len();
    let len = bytes.len().min(memory.len() - at).min(PAGE_SIZE);
    memory.write_bytes(at, &bytes[..len]).expect("inside the memory");
}

/// Returns a grant reference: one of `grefs`, or, seldom, any.
pub fn pick_gref(grefs: &[GrantRef], which: u16) -> GrantRef {
    if which < 0xff00 {
        grefs[usize::from(which) % grefs.len()]
    } else {
        GrantRef(u32::from(which & 0xff))
    }
}

/// Allocates a port for the other domain, and binds it there.
pub fn channel(from: &LocalDomain, to: &LocalDomain) -> (LocalChannel, LocalChannel) {
    use pvio_event_channel::EventChannel;
    let here = from.alloc_unbound(to.id()).expect("enough ports");
    let there = to.bind_interdomain(from.id(), here.port()).expect("an unbound port");
    (here, there)
}
