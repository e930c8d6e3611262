//! A hostile guest: it may write any data to shared memory, at any time.

use crate::disk::actions::{Do, Mischief};
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{Access, GrantRef, Granter};
use pvio_ring::proto::blkif::{Abi, DataOp, Indirect, Request, Segment, Segments};
use pvio_ring::shm::Region;
use pvio_sim::local::events::LocalChannel;
use pvio_sim::local::memory::LocalPages;
use pvio_sim::{LocalDomain, Menu, Sim};
use pvio_xenbus::handshake::common::{DeviceAddr, state_path, switch_state};
use pvio_xenbus::handshake::vbd::{FrontRequest, Protocol, Queue};
use pvio_xenbus::{XenbusState, Xenstore};
use pvio_xenstored::{LocalClient, Store};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::Ordering;

pub struct HostileGuest {
    addr: DeviceAddr,
    domain: LocalDomain,
    xs: LocalClient,
    session: Option<ConnectedRing>,
}

struct ConnectedRing {
    ring: LocalPages,
    data: LocalPages,
    grefs: Vec<GrantRef>,
    channel: Option<LocalChannel>,
    abi: Abi,
    produced: u32,
}

impl HostileGuest {
    pub fn boot(domain: LocalDomain, store: &Rc<RefCell<Store>>, addr: DeviceAddr) -> Self {
        let xs = LocalClient::connect(store, domain.id());
        Self { addr, domain, xs, session: None }
    }

    pub fn menu(&self, menu: &mut Menu<Do>) {
        let mut may = |weight, mischief| menu.may(weight, || Do::HostileGuest(mischief));
        may(if self.session.is_some() { 5 } else { 100 }, Mischief::Connect);
        may(10, Mischief::Key);
        if self.session.is_some() {
            may(100, Mischief::Ask);
            may(50, Mischief::Scribble);
            may(5, Mischief::Revoke);
            may(2, Mischief::Hang);
            may(100, Mischief::Notify);
        }
    }

    pub fn act(&mut self, mischief: &Mischief, sim: &mut Sim) {
        match (mischief, &mut self.session) {
            (Mischief::Connect, _) => self.connect(sim),
            (Mischief::Key, _) => self.key(sim),
            (Mischief::Ask, Some(session)) => session.ask(sim),
            (Mischief::Scribble, Some(session)) => scribble(&session.ring, sim),
            (Mischief::Revoke, Some(session)) => {
                let gref = sim.pick(&session.grefs);
                let _ = self.domain.end_access(gref);
            }
            (Mischief::Hang, Some(session)) => session.channel = None,
            (Mischief::Notify, Some(session)) => {
                if let Some(channel) = &session.channel {
                    channel.notify().expect("the domain is alive");
                }
            }
            _ => {}
        }
    }

    fn connect(&mut self, sim: &mut Sim) {
        let (domain, back) = (&self.domain, self.addr.back);
        let (Ok(ring), Ok(data)) = (domain.alloc_pages(1), domain.alloc_pages(2)) else { return };
        let grants = [
            domain.grant(
                back,
                &ring,
                0,
                if sim.one_in(10) { Access::ReadOnly } else { Access::ReadWrite },
            ),
            domain.grant(back, &data, 0, Access::ReadWrite),
            domain.grant(back, &data, 1, Access::ReadOnly),
        ];
        let Ok(grefs) = grants.into_iter().collect::<Result<Vec<_>, _>>() else { return };
        let Ok(channel) = domain.alloc_unbound(back) else { return };
        let (protocol, abi) = sim.pick(&[
            (None, Abi::X86_32),
            (Some(Protocol::X86_64), Abi::X86_64),
            (Some(Protocol::X86_32), Abi::X86_32),
        ]);
        // The indices of a new ring.
        for (at, value) in [(0, 0), (4, 1), (8, 0), (12, 1)] {
            ring.store_u32(at, value, Ordering::Release);
        }
        let queue = Queue { ring_refs: vec![grefs[0].0], event_channel: channel.port().0 };
        let request = FrontRequest { protocol, persistent: sim.one_in(2), queues: vec![queue] };
        let base = self.addr.frontend_path();
        // The device may not exist.
        let _ = request.write(&mut self.xs, &base);
        for state in [XenbusState::Initialising, XenbusState::Initialised, XenbusState::Connected] {
            if !sim.one_in(4) {
                let _ = switch_state(&mut self.xs, &base, state);
            }
        }
        self.session =
            Some(ConnectedRing { ring, data, grefs, channel: Some(channel), abi, produced: 0 });
    }

    fn key(&mut self, sim: &mut Sim) {
        let base = self.addr.frontend_path();
        let keys = [
            "ring-ref",
            "event-channel",
            "protocol",
            "ring-page-order",
            "num-ring-pages",
            "multi-queue-num-queues",
            "feature-persistent",
            "ring-ref0",
            "queue-0",
        ];
        let path = match sim.pick(&["state", "state", "key"]) {
            "state" => state_path(&base),
            _ => format!("{base}/{}", sim.pick(&keys)),
        };
        let value = nonsense(sim);
        let _ = match sim.one_in(10) {
            true => self.xs.rm(&path),
            false => self.xs.write(&path, &value),
        };
    }
}

impl ConnectedRing {
    fn ask(&mut self, sim: &mut Sim) {
        for _ in 0..1 + sim.below(6) {
            let mut bytes = [0; 112];
            let segment = |sim: &mut Sim| Segment {
                gref: if sim.one_in(20) {
                    GrantRef(sim.number() as u32)
                } else {
                    sim.pick(&self.grefs)
                },
                first: sim.below(8) as u8,
                last: if sim.one_in(20) { sim.number() as u8 } else { 7 },
            };
            let segments: Vec<Segment> = (0..sim.below(4)).map(|_| segment(sim)).collect();
            let op = sim.pick(&[DataOp::Read, DataOp::Write, DataOp::Flush, DataOp::WriteBarrier]);
            let (id, sector) = (sim.number(), sim.below(260));
            let request = if sim.one_in(4) {
                // The tables are data pages, which change at any time.
                let count = if sim.one_in(4) { 1 + sim.below(4096) } else { 1 + sim.below(30) };
                let pages: Vec<GrantRef> =
                    (0..count.div_ceil(512)).map(|_| segment(sim).gref).collect();
                for n in 0..20 {
                    let at = sim.index(2) * 4096 + 8 * n;
                    self.data.write_bytes(at, &segment(sim).write()).expect("inside the pages");
                }
                let indirect = Indirect::new(count as usize, &pages).expect("as many as it takes");
                Request::Indirect { op, id, sector, indirect }
            } else {
                let segments = Segments::from_slice(&segments).expect("at most 11");
                Request::Data { op, id, sector, segments }
            };
            request.write(self.abi, 0, &mut bytes);
            if sim.one_in(20) {
                let at = sim.index(bytes.len());
                sim.fill(&mut bytes[at..]);
            }
            let size = self.abi.slot_size();
            let at = 64 + (self.produced % 32) as usize * size;
            self.ring.write_words(at, &bytes[..size]).expect("inside the page");
            self.produced = self.produced.wrapping_add(1);
        }
        // It takes the number of completed requests from the page; it may overtake the backend.
        let answered = self.ring.load_u32(8, Ordering::Acquire).expect("inside the page");
        if self.produced.wrapping_sub(answered) > 32 && !sim.one_in(20) {
            self.produced = answered.wrapping_add(32);
        }
        self.ring.store_u32(0, self.produced, Ordering::Release);
        // It also writes to pages of outstanding requests.
        let mut bytes = [0; 64];
        sim.fill(&mut bytes);
        let at = sim.below(8192 - 64) as usize;
        self.data.write_bytes(at, &bytes).expect("inside the pages");
    }
}

/// Writes random words to a ring's page, mostly to the indices.
pub fn scribble(ring: &impl Region, sim: &mut Sim) {
    let at = if sim.one_in(2) { 4 * sim.below(4) } else { 4 * sim.below(1024) } as usize;
    let now = ring.load_u32(at, Ordering::Relaxed).expect("inside the page");
    let value = match sim.below(3) {
        0 => sim.number() as u32,
        1 => now.wrapping_add(sim.below(70) as u32),
        _ => now.wrapping_sub(sim.below(70) as u32),
    };
    ring.store_u32(at, value, Ordering::Release);
}

/// Returns a value that is invalid for a key, or may be.
pub fn nonsense(sim: &mut Sim) -> Vec<u8> {
    match sim.below(6) {
        0 => Vec::new(),
        1 => b"x86_32-abi".to_vec(),
        2 => sim.number().to_string().into(),
        3 => (0..sim.below(300)).map(|_| sim.number() as u8).filter(|b| *b != 0).collect(),
        _ => sim.below(9).to_string().into(),
    }
}
