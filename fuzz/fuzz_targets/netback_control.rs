//! Several queues of a virtual NIC and its control ring, with a hostile frontend: hash, steering, staging
//! grants, and messages between the queues.
//!
//! Each control request gets exactly one response, in order. No buffer is lost that was passed between
//! queues, and staged pages are unmapped at the end.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_fuzz::nic::{Back, Bits, DEPTH, Frame, Guest, TxSlot, assert_no_buffer_lost};
use pvio_fuzz::{BACK, Domains, FRONT, Scribble, Shared, pick_gref, write_somewhere};
use pvio_grant_table::Access;
use pvio_netback::port::{NetPort, memory::pair};
use pvio_netback::queue::{ControlRefs, Policy, QueueSet, STAGED_MAX, Waker};
use pvio_ring::FrontRing;
use pvio_ring::proto::netif::{CTRL_SLOT_SIZE, CtrlRequest, CtrlResponse, CtrlStatus};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

const QUEUES: usize = 2;

#[derive(Arbitrary, Debug)]
struct Input {
    features: Bits,
    stages: bool,
    map: bool,
    actions: Vec<Action>,
}

#[derive(Arbitrary, Debug)]
enum Action {
    Request {
        kind: u8,
        data: [Datum; 3],
    },
    Raw([u8; 16]),
    Scribble(Scribble),
    /// Writes to the page of keys, mappings and lists.
    Page {
        at: u8,
        bytes: Vec<u8>,
    },
    /// Writes an entry of a list of grants.
    List {
        at: u8,
        gref: u16,
        flags: u8,
        status: u16,
    },
    Arrive {
        queue: bool,
        frame: Frame,
    },
    Send {
        queue: bool,
        slots: Vec<TxSlot>,
    },
    Post {
        queue: bool,
        count: u8,
        gref: u16,
    },
    Drain(bool),
    Poll {
        queue: bool,
        budget: u8,
    },
    Sleep(bool),
    Tick {
        queue: bool,
        millis: u16,
    },
    Revoke(u8),
    Headroom(u16),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Datum {
    /// A small number.
    Small(u8),
    /// The grant of the page.
    Page,
    Any(u32),
}

impl Datum {
    fn value(self, page: &Shared) -> u32 {
        match self {
            Self::Small(value) => value.into(),
            Self::Page => page.grefs[0].0,
            Self::Any(value) => value,
        }
    }
}

fuzz_target!(|input: Input| {
    let domains = Domains::default();
    let features = input.features.features();
    let set = QueueSet::new((0..QUEUES).map(|_| Arc::new(|| ()) as Waker));
    let ring_page = Shared::new(&domains.front, BACK, 1, Access::ReadWrite);
    let page = Shared::new(&domains.front, BACK, 1, Access::ReadWrite);
    let mut ring = FrontRing::init(ring_page.pages.clone(), CTRL_SLOT_SIZE).expect("a valid size");
    let control_channel = domains.front.alloc_unbound(BACK).expect("enough ports");
    let refs = ControlRefs { ring: ring_page.grefs[0], event: control_channel.port() };

    let mut guests: Vec<_> = (0..QUEUES).map(|_| Guest::new(&domains, 0, false)).collect();
    let attach = |(index, guest): (usize, &Guest)| {
        let back = domains.back.clone();
        let mut queue =
            Back::attach(back, FRONT, &guest.refs, features, Arc::default()).expect("a ring");
        queue.set_policy(if input.map { Policy::Map } else { Policy::Copy });
        queue.join(&set, index);
        queue
    };
    let mut queues: Vec<_> = guests.iter().enumerate().map(attach).collect();
    queues[0].serve_control(&refs, input.stages).expect("a valid ring");
    let mut ports: Vec<_> = (0..QUEUES).map(|_| pair(DEPTH)).collect();
    let mut now = Duration::ZERO;
    let mut outstanding = VecDeque::new();
    let mut honest = true;
    let mut next_id = 0_u16;

    for action in input.actions {
        match action {
            Action::Request { kind, data } => {
                let data = data.map(|datum| datum.value(&page));
                let request = CtrlRequest { id: next_id, kind: u16::from(kind % 12), data };
                if ring.push(&request.to_bytes()).is_ok() {
                    outstanding.push_back((next_id, request.kind));
                    next_id = next_id.wrapping_add(1);
                    let _ = ring.publish();
                }
            }
            Action::Raw(bytes) => {
                if ring.push(&bytes).is_ok() {
                    let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
                    outstanding.push_back((word(0), word(2)));
                    let _ = ring.publish();
                }
            }
            Action::Scribble(scribble) => {
                honest = false;
                scribble.write(&ring_page.pages);
            }
            Action::Page { at, bytes } => write_somewhere(&page.pages, at.into(), &bytes),
            Action::List { at, gref, flags, status } => {
                let mut entry = pick_gref(&guests[0].data.grefs, gref).0.to_le_bytes().to_vec();
                entry.extend(u16::from(flags).to_le_bytes());
                entry.extend(status.to_le_bytes());
                write_somewhere(&page.pages, at.into(), &entry);
            }
            Action::Arrive { queue, frame } => frame.inject(&mut ports[usize::from(queue)].1),
            Action::Send { queue, slots } => {
                let guest = &mut guests[usize::from(queue)];
                slots.into_iter().for_each(|slot| guest.send_slot(slot));
                let _ = guest.tx.publish();
            }
            Action::Post { queue, count, gref } => {
                let guest = &mut guests[usize::from(queue)];
                guest.post(count, gref);
                let _ = guest.rx.publish();
            }
            Action::Drain(queue) => {
                let wire = &mut ports[usize::from(queue)].1;
                while let Some(packet) = wire.receive() {
                    wire.recycle(packet.buf);
                }
                queues[usize::from(queue)].unblock();
            }
            Action::Poll { queue, budget } => {
                let index = usize::from(queue);
                if let Ok(progress) = queues[index].poll(&mut ports[index].0, budget.into()) {
                    let most = usize::from(budget);
                    assert!(progress.tx <= most && progress.rx <= most, "{progress:?} of {budget}");
                }
                guests[index].take_tx_responses();
                guests[index].take_rx_responses();
            }
            Action::Sleep(queue) => drop(queues[usize::from(queue)].final_check()),
            Action::Tick { queue, millis } => {
                now += Duration::from_millis(millis.into());
                let index = usize::from(queue);
                queues[index].set_clock(now);
                let _ = queues[index].tick(&mut ports[index].0);
            }
            Action::Revoke(which) => {
                let fixed = guests[0].data.grefs.pop();
                guests[0].data.revoke(which);
                guests[0].data.grefs.extend(fixed);
            }
            Action::Headroom(bytes) => queues[0].headroom().set(bytes),
        }
        if honest {
            take_responses(&mut ring, &mut outstanding);
        }
        assert!(queues.iter().all(|queue| queue.staged() <= STAGED_MAX));
    }

    for round in 0.. {
        let mut any = false;
        for (queue, (port, wire)) in queues.iter_mut().zip(&mut ports) {
            while let Some(packet) = wire.receive() {
                wire.recycle(packet.buf);
            }
            queue.unblock();
            let progress = queue.poll(port, 64);
            any |= progress.is_ok_and(|progress| progress.any());
        }
        if !any && round > 20 {
            break;
        }
        assert!(round < 600, "the queues are never idle");
    }
    if honest && queues.iter_mut().all(|queue| queue.has_work().is_ok()) {
        take_responses(&mut ring, &mut outstanding);
        assert_eq!(outstanding, [], "control requests without a response");
    }
    // Buffers that a queue lent return once the packets of all queues are dropped.
    for (queue, (port, _)) in queues.iter_mut().zip(&mut ports) {
        queue.drop_backlog(port);
    }
    let failed = queues.iter_mut().any(|queue| queue.has_work().is_err());
    for (queue, (port, _)) in queues.iter_mut().zip(&mut ports) {
        let _ = queue.poll(port, 0);
    }
    drop((queues, control_channel));
    for (port, wire) in &mut ports {
        if !failed {
            assert_no_buffer_lost(port, wire);
        }
    }
    domains.assert_backend_is_empty();
    guests.into_iter().for_each(Guest::assert_released);
    ring_page.assert_unmapped();
    page.assert_unmapped();
});

fn take_responses(
    ring: &mut FrontRing<pvio_sim::local::memory::LocalPages>,
    outstanding: &mut VecDeque<(u16, u16)>,
) {
    while let Some(mut slot) = ring.pop().expect("the backend's indices are valid") {
        let response = CtrlResponse::read(&mut slot).expect("whole slots");
        let request = outstanding.pop_front().expect("a response without a request");
        assert_eq!((response.id, response.kind), request, "responses are in order");
        assert!(CtrlStatus::from_number(response.status).is_some(), "a defined status");
    }
}
