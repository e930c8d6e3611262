//! A virtual NIC that is resumed from arbitrary rings and an arbitrary in-flight record.
//!
//! The session is resumed or rejected; if it is resumed, its queue works with a hostile frontend as any
//! other, and everything is released at the end.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_fuzz::nic::{Bits, DEPTH, Frame, Guest, TxSlot, assert_no_buffer_lost};
use pvio_fuzz::{BACK, Domains, FRONT, Scribble, Shared};
use pvio_grant_table::Access;
use pvio_netback::Queue;
use pvio_netback::port::{NetPort, memory::pair};
use pvio_netback::queue::{ControlRefs, QueueSet, SessionRefs, VifRecord, Waker};
use pvio_ring::FrontRing;
use pvio_ring::proto::netif::{CTRL_SLOT_SIZE, CtrlRequest};
use pvio_ring::shm::{HeapMemory, PAGE_SIZE, Region};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

#[derive(Arbitrary, Debug)]
struct Input {
    features: Bits,
    /// What the frontend and the earlier process had done.
    sent: Vec<TxSlot>,
    posted: u8,
    ring_tx: Vec<Scribble>,
    ring_rx: Vec<Scribble>,
    ring_control: Vec<Scribble>,
    /// The numbers of the sections of both rings, and words of the record, by distance from its end.
    numbers: [[u8; 4]; 2],
    words: Vec<(u16, Word)>,
    actions: Vec<Action>,
}

#[derive(Arbitrary, Debug)]
enum Word {
    Small(u8),
    Any(u64),
}

#[derive(Arbitrary, Debug)]
enum Action {
    Send(Vec<TxSlot>),
    Post { count: u8, gref: u16 },
    Request { kind: u8, data: [u8; 3] },
    ScribbleTx(Scribble),
    ScribbleRx(Scribble),
    Arrive(Frame),
    Poll(u8),
    Sleep,
}

fuzz_target!(|input: Input| {
    let domains = Domains::default();
    let mut guest = Guest::new(&domains, 0, false);
    let ring_page = Shared::new(&domains.front, BACK, 1, Access::ReadWrite);
    let mut ring = FrontRing::init(ring_page.pages.clone(), CTRL_SLOT_SIZE).expect("a valid size");
    let control_channel = domains.front.alloc_unbound(BACK).expect("enough ports");
    let control = ControlRefs { ring: ring_page.grefs[0], event: control_channel.port() };
    input.sent.iter().for_each(|slot| guest.send_slot(*slot));
    guest.post(input.posted, 0);
    let _ = (guest.tx.publish(), guest.rx.publish());

    let session = SessionRefs {
        peer: FRONT,
        device: 0,
        queues: std::slice::from_ref(&guest.refs),
        control: Some(control),
    };
    let memory = HeapMemory::pages(session.record_len().div_ceil(PAGE_SIZE));
    VifRecord::create(memory.clone(), &session).expect("large enough").commit();
    let len = session.record_len();
    // The last sections are those of the two rings.
    let sections = ring_sections(len);
    for (at, numbers) in sections.into_iter().zip(input.numbers) {
        for (n, number) in numbers.into_iter().enumerate() {
            memory.store_u64(at + n * 8, number.into(), Relaxed);
        }
    }
    for (at, word) in &input.words {
        // The header stays valid: another one is not opened.
        let at = len - 8 - usize::from(*at) * 8 % (len - 256);
        let word = match *word {
            Word::Small(word) => word.into(),
            Word::Any(word) => word,
        };
        memory.store_u64(at & !7, word, Relaxed);
    }
    for (scribbles, page) in [
        (&input.ring_tx, &guest.tx_page),
        (&input.ring_rx, &guest.rx_page),
        (&input.ring_control, &ring_page),
    ] {
        scribbles.iter().for_each(|scribble| scribble.write(&page.pages));
    }
    guest.honest = false;

    let (mut port, mut wire) = pair(DEPTH);
    if let Ok(record) = VifRecord::open(memory, &session) {
        let groups = Arc::new(record.groups().expect("the section"));
        let back = domains.back.clone();
        let features = input.features.features();
        let parts = (&record, 0, &groups);
        let queue =
            Queue::attach_recorded(back, FRONT, &guest.refs, features, Arc::default(), parts);
        if let Ok(mut queue) = queue {
            let set = QueueSet::new([Arc::new(|| ()) as Waker]);
            queue.join(&set, 0);
            if queue.serve_control_recorded(&control, true, &record).is_ok()
                && queue.restage(&queue.staged_before(0)).is_ok()
            {
                for action in input.actions {
                    match action {
                        Action::Send(slots) => {
                            slots.into_iter().for_each(|slot| guest.send_slot(slot));
                            let _ = guest.tx.publish();
                        }
                        Action::Post { count, gref } => {
                            guest.post(count, gref);
                            let _ = guest.rx.publish();
                        }
                        Action::Request { kind, data } => {
                            let data = data.map(u32::from);
                            let request = CtrlRequest { id: 0, kind: kind.into(), data };
                            let _ = ring.push(&request.to_bytes()).map(|()| ring.publish());
                        }
                        Action::ScribbleTx(scribble) => scribble.write(&guest.tx_page.pages),
                        Action::ScribbleRx(scribble) => scribble.write(&guest.rx_page.pages),
                        Action::Arrive(frame) => frame.inject(&mut wire),
                        Action::Poll(budget) => {
                            if let Ok(progress) = queue.poll(&mut port, budget.into()) {
                                let most = usize::from(budget);
                                assert!(progress.tx <= most && progress.rx <= most, "{progress:?}");
                            }
                        }
                        Action::Sleep => drop(queue.final_check()),
                    }
                    while let Some(packet) = wire.receive() {
                        wire.recycle(packet.buf);
                    }
                }
                for round in 0.. {
                    while let Some(packet) = wire.receive() {
                        wire.recycle(packet.buf);
                    }
                    queue.unblock();
                    if !queue.poll(&mut port, 64).is_ok_and(|progress| progress.any()) {
                        break;
                    }
                    assert!(round < 600, "the queue is never idle");
                }
            }
            queue.drop_backlog(&mut port);
        }
    }
    assert_no_buffer_lost(&mut port, &mut wire);
    drop(control_channel);
    domains.assert_backend_is_empty();
    guest.assert_released();
    ring_page.assert_unmapped();
});

/// Returns the offsets of the sections of the transmit and the receive ring in a record of `len` bytes.
fn ring_sections(len: usize) -> [usize; 2] {
    use pvio_ring::RingLayout;
    use pvio_ring::inflight::OrderedLog;
    use pvio_ring::proto::netif::{RX_SLOT_SIZE, TX_RESPONSE_SIZE, TX_SLOT_SIZE};
    let len_of = |slot, response| {
        let layout = RingLayout::new(PAGE_SIZE, slot).expect("a layout");
        OrderedLog::<HeapMemory>::section_len(layout, response).next_multiple_of(64)
    };
    let rx = len - len_of(RX_SLOT_SIZE, RX_SLOT_SIZE);
    [rx - len_of(TX_SLOT_SIZE, TX_RESPONSE_SIZE), rx]
}
