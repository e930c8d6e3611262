//! A queue of a virtual disk, frontend side, with a hostile backend.
//!
//! Each request completes at most once, whatever the backend writes; with a backend that responds once to
//! each request it sees, all of them complete. Then the backend can be detached, and nothing is leaked.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pvio_blkfront::{Op, Queue, QueueLimits, Shape, SlotId};
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_fuzz::{BACK, Domains, FRONT, Scribble};
use pvio_grant_table::{Access, GrantMapper};
use pvio_ring::BackRing;
use pvio_ring::proto::blkif::{Abi, Request, Response, Status};
use std::collections::{HashMap, VecDeque};

const SECTORS: u64 = 1 << 20;

#[derive(Arbitrary, Debug)]
struct Input {
    pages_per_slot: u8,
    ring_pages: bool,
    wipes: bool,
    limits: Limits,
    actions: Vec<Action>,
}

#[derive(Arbitrary, Debug)]
struct Limits {
    segments: u16,
    flush: u8,
    discard: bool,
    secure_discard: bool,
    read_only: bool,
    sector_size: u8,
    sectors: Option<u64>,
}

impl Limits {
    fn limits(&self) -> QueueLimits {
        use pvio_blkfront::FlushBy;
        QueueLimits {
            segments: self.segments.into(),
            flush: [FlushBy::Flush, FlushBy::Barrier, FlushBy::Nothing]
                [usize::from(self.flush % 3)],
            discard: self.discard,
            secure_discard: self.secure_discard,
            read_only: self.read_only,
            sector_size: 512 << (self.sector_size % 9),
            sectors: self.sectors.unwrap_or(SECTORS),
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Action {
    Start {
        kind: u8,
        sector: u32,
        sectors: u16,
    },
    StartAny {
        kind: u8,
        sector: u64,
        sectors: u64,
    },
    Publish,
    Poll,
    Sleep,
    /// The backend responds to a request that it has seen.
    Respond {
        which: u8,
        status: i8,
    },
    /// The backend responds with anything.
    Raw {
        id: u16,
        rest: u64,
    },
    PublishResponses,
    Notify,
    Scribble(Scribble),
    /// The backend is replaced.
    Replay,
}

fuzz_target!(|input: Input| {
    let domains = Domains::default();
    let shape = Shape {
        ring_pages: if input.ring_pages { 2 } else { 1 },
        pages_per_slot: 11 + usize::from(input.pages_per_slot % 8),
    };
    let front = domains.front.clone();
    let mut queue = Queue::with_shape(front, BACK, 51712, shape).expect("enough memory");
    queue.wipe(input.wipes);
    queue.limit(input.limits.limits());
    let mut back = Back::attach(&domains, &queue);
    let mut honest = true;
    let mut dead = false;
    // Requests without a completion, by slot.
    let mut started: HashMap<SlotId, Op> = HashMap::new();

    for action in input.actions {
        match action {
            Action::Start { kind, sector, sectors } => {
                let bytes = usize::from(sectors % 160) * 512;
                start(&mut queue, &mut started, op(kind, sector.into(), sectors.into(), bytes));
            }
            Action::StartAny { kind, sector, sectors } => {
                start(&mut queue, &mut started, op(kind, sector, sectors, sectors as usize));
            }
            Action::Publish => dead |= queue.publish().is_err(),
            Action::Poll if !dead => dead = !poll(&mut queue, &mut started),
            Action::Poll => {}
            Action::Sleep => drop(queue.final_check()),
            Action::Respond { which, status } => back.respond(which, status),
            Action::Raw { id, rest } => {
                let mut bytes = u64::from(id).to_le_bytes().to_vec();
                bytes.extend(rest.to_le_bytes());
                honest &= back.ring.push(&bytes).is_err();
            }
            Action::PublishResponses => {
                let _ = back.ring.publish();
            }
            Action::Notify => drop(back.channel.notify()),
            Action::Scribble(scribble) => {
                honest = false;
                scribble.write(&back.page);
            }
            Action::Replay => {
                let next = queue.replay(BACK).expect("enough memory");
                let before = std::mem::replace(&mut queue, next);
                drop(back);
                assert!(before.dismantle().is_ok(), "the backend has unmapped everything");
                back = Back::attach(&domains, &queue);
                (honest, dead) = (true, false);
            }
        }
        assert!(!(honest && dead), "a backend without a fault");
    }

    // A backend that behaves from now on completes everything.
    if honest {
        for round in 0.. {
            queue.publish().expect("the backend is alive");
            while back.take() || !back.seen.is_empty() {
                back.respond(0, 0);
            }
            let _ = back.ring.publish();
            assert!(poll(&mut queue, &mut started), "a backend without a fault");
            if started.is_empty() {
                break;
            }
            // Each round completes a part of each request at least; a request has 160 parts at most.
            assert!(round < 400, "{} requests do not complete", started.len());
        }
        assert_eq!(queue.in_flight(), 0);
    }
    drop(back);
    assert!(queue.dismantle().is_ok(), "the backend has unmapped everything");
    domains.assert_frontend_is_empty();
    domains.assert_backend_is_empty();
});

type Front = Queue<pvio_sim::LocalDomain>;

fn op(kind: u8, sector: u64, sectors: u64, bytes: usize) -> Op {
    match kind % 5 {
        0 => Op::Read { sector, bytes },
        1 => Op::Write { sector, bytes },
        2 => Op::Flush,
        3 => Op::Discard { sector, sectors },
        _ => Op::SecureDiscard { sector, sectors },
    }
}

fn start(queue: &mut Front, started: &mut HashMap<SlotId, Op>, op: Op) {
    let Some(slot) = queue.reserve() else { return };
    match queue.start(slot, op) {
        Ok(()) => assert_eq!(started.insert(slot, op), None, "a slot in use was reserved"),
        Err(_) => queue.release(slot),
    }
}

/// Takes completions; returns whether the backend is without fault.
fn poll(queue: &mut Front, started: &mut HashMap<SlotId, Op>) -> bool {
    let mut done = Vec::new();
    let alive = queue.poll(|slot, op, _| {
        assert_eq!(
            started.remove(&slot),
            Some(op),
            "the completion of a request that is in flight"
        );
        done.push(slot);
    });
    done.into_iter().for_each(|slot| queue.release(slot));
    alive.is_ok()
}

struct Back {
    ring: BackRing<pvio_sim::local::memory::LocalMapping>,
    /// Another mapping of the ring, to overwrite it.
    page: pvio_sim::local::memory::LocalMapping,
    channel: pvio_sim::local::events::LocalChannel,
    seen: VecDeque<u64>,
}

impl Back {
    fn attach(domains: &Domains, queue: &Front) -> Self {
        let map =
            || domains.back.map(FRONT, queue.ring_grefs(), Access::ReadWrite).expect("granted");
        Self {
            ring: BackRing::attach(map(), Abi::X86_64.slot_size()).expect("a valid ring"),
            page: map(),
            channel: domains.back.bind_interdomain(FRONT, queue.channel().port()).expect("a port"),
            seen: VecDeque::new(),
        }
    }

    /// Takes a request, which is valid.
    fn take(&mut self) -> bool {
        let Ok(Some(mut slot)) = self.ring.pop() else { return false };
        let request = Request::read(&mut slot, Abi::X86_64).expect("whole slots");
        // A hostile backend may have overwritten it.
        let id = match request {
            Ok(
                Request::Data { id, .. }
                | Request::Indirect { id, .. }
                | Request::Discard { id, .. },
            ) => id,
            Err(refusal) => refusal.id,
        };
        self.seen.push_back(id);
        true
    }

    fn respond(&mut self, which: u8, status: i8) {
        self.take();
        if self.seen.is_empty() {
            return;
        }
        let id = self.seen.remove(usize::from(which) % self.seen.len()).expect("inside the list");
        let mut bytes = [0; 16];
        let response = Response { id, op: 0, status: Status::from_wire(status.into()) };
        let _ = self.ring.push(response.write(Abi::X86_64, &mut bytes));
    }
}
