//! A queue of a virtual disk that is resumed from an arbitrary ring page and an arbitrary in-flight record.
//!
//! The session is resumed or rejected. If it is resumed, each request and each response in the record gets
//! exactly one response, and everything is released at the end.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pvio_blkback::{DataPath, DiskState, Geometry, Queue, QueueParts, QueueRecord, Stats};
use pvio_fuzz::disk::{Engine, INDIRECT, SECTORS, Segment};
use pvio_fuzz::{BACK, Domains, FRONT, Scribble, Shared, channel};
use pvio_grant_table::{Access, GrantMapper};
use pvio_ring::inflight::{Record, RequestLog, SessionKey};
use pvio_ring::proto::blkif::Abi;
use pvio_ring::shm::{HeapMemory, PAGE_SIZE, Region};
use pvio_ring::{BackRing, FrontRing, RingLayout};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

const ENTRIES: usize = 64;
/// Offset of the first entry of a section, and of the parts of an entry (`ring::inflight`).
const RESPONSE: usize = 24;
const SLOT: usize = 40;

#[derive(Arbitrary, Debug)]
struct Input {
    path: u8,
    x86_32: bool,
    died: bool,
    /// Number of published responses, by the ring, and what the record has less or more.
    produced: u8,
    answered: i8,
    entries: Vec<Entry>,
    /// Words of the record that are overwritten.
    words: Vec<(u16, u64)>,
    ring: Vec<Scribble>,
    actions: Vec<Action>,
}

#[derive(Arbitrary, Debug)]
struct Entry {
    at: u8,
    state: State,
    sequence: u8,
    deaths: u8,
    op: u8,
    count: u8,
    sector: u16,
    segments: [Segment; 3],
}

#[derive(Arbitrary, Debug)]
enum State {
    Free,
    InFlight,
    /// Done, with this distance from the number of published responses.
    Done(i8),
    Any(u64),
}

#[derive(Arbitrary, Debug)]
enum Action {
    /// A new request, without data.
    Flush,
    Scribble(Scribble),
    Poll(u8),
    Complete {
        which: u8,
        result: u8,
    },
}

fuzz_target!(|input: Input| {
    let domains = Domains::default();
    let abi = if input.x86_32 { Abi::X86_32 } else { Abi::X86_64 };
    let ring_page = Shared::new(&domains.front, BACK, 1, Access::ReadWrite);
    let data = Shared::new(&domains.front, BACK, 4, Access::ReadWrite);
    let produced = u32::from(input.produced);
    let mut front =
        FrontRing::init_at(ring_page.pages.clone(), abi.slot_size(), produced).expect("a size");
    let layout = RingLayout::new(PAGE_SIZE, abi.slot_size()).expect("a layout");
    let slots = layout.slots() as usize;

    let section_len = RequestLog::<HeapMemory>::section_len(layout);
    let mut key = SessionKey::new();
    key.add(7).section(section_len);
    let memory = HeapMemory::pages(key.record_len().div_ceil(PAGE_SIZE));
    let record = Record::create(memory, key).expect("large enough");
    record.commit();
    let section = record.section(0).expect("the section");
    let stride = (section_len - ENTRIES) / slots;
    let answered = u64::from(input.produced).saturating_add_signed(input.answered.into());
    section.store_u64(0, answered, Relaxed);
    let id_at = if input.x86_32 { 4 } else { 8 };
    // Ids of the requests of the record, each of which has at most one response.
    let mut ids = HashMap::new();
    for entry in &input.entries {
        let at = usize::from(entry.at) % slots;
        let id = 1000 + at as u64;
        ids.insert(id, 0);
        let state = match entry.state {
            State::Free => 0,
            State::InFlight => 1,
            State::Done(distance) => {
                u64::from(input.produced).saturating_add_signed(distance.into()) << 2 | 2
            }
            State::Any(word) => word,
        };
        let at = ENTRIES + at * stride;
        for (offset, word) in [(0, state), (8, entry.sequence.into()), (16, entry.deaths.into())] {
            section.store_u64(at + offset, word, Relaxed);
        }
        section.store_u64(at + RESPONSE, id, Relaxed);
        let mut slot = vec![entry.op, entry.count];
        slot.resize(id_at, 0);
        slot.extend(id.to_le_bytes());
        slot.extend(u64::from(entry.sector).to_le_bytes());
        slot.extend(entry.segments.iter().flat_map(|segment| segment.bytes(&data)));
        section.write_bytes(at + SLOT, &slot).expect("inside the entry");
    }
    for (at, word) in &input.words {
        section.store_u64(usize::from(*at) * 8 % section_len & !7, *word, Relaxed);
    }
    let mut honest = input.ring.is_empty() && input.words.is_empty();
    for scribble in &input.ring {
        scribble.write(&ring_page.pages);
    }

    let (front_channel, channel) = channel(&domains.front, &domains.back);
    let mapped = domains.back.map(FRONT, &ring_page.grefs, Access::ReadWrite).expect("granted");
    let Ok(mut ring) = BackRing::attach(mapped, abi.slot_size()) else { return };
    let Ok(record) = QueueRecord::resume(&record, 0, &mut ring, abi, input.died) else {
        drop((ring, channel, front_channel));
        domains.assert_backend_is_empty();
        return;
    };
    assert!(record.given_up() <= record.inherited() && record.inherited() <= slots);
    let geometry = Geometry::new(SECTORS);
    let parts = QueueParts {
        frontend: FRONT,
        disk: Arc::new(DiskState::new(geometry)),
        grants: domains.back.clone(),
        data_path: DataPath::ALL[usize::from(input.path) % 4],
        record,
        ring,
        channel,
        abi,
        max_indirect_segments: INDIRECT,
        stats: Arc::new(Stats::default()),
    };
    let mut queue = Queue::new(parts, Engine::new(geometry, slots));
    let mut dead = false;
    for action in input.actions {
        match action {
            Action::Flush => {
                let mut slot = vec![3, 0];
                slot.resize(abi.slot_size(), 0);
                slot[id_at] = 5;
                let _ = front.push(&slot).map(|()| front.publish());
            }
            Action::Scribble(scribble) => {
                honest = false;
                scribble.write(&ring_page.pages);
            }
            Action::Poll(budget) if !dead => dead = queue.poll(budget.into()).is_err(),
            Action::Poll(_) => {}
            Action::Complete { which, result } => queue.engine_mut().complete(which, result),
        }
        assert!(queue.in_flight() <= slots);
    }
    queue.drain();
    for round in 0.. {
        while !queue.engine_mut().waiting.is_empty() {
            queue.engine_mut().complete(0, 9);
        }
        let ended = queue.poll(0).is_err();
        dead |= ended;
        if queue.in_flight() == 0 && (ended || queue.is_drained()) {
            break;
        }
        assert!(round < 4 * slots, "the queue does not drain");
    }
    drop((queue, front_channel));
    if honest && !dead {
        // What it published since: requests of the record, and those above with id 5.
        let now = ring_page.pages.load_u32(8, Relaxed).expect("inside the page");
        let published = now.wrapping_sub(produced);
        assert!(published as usize <= 2 * slots + 64, "{published} responses");
        for index in (0..published).rev().take(slots) {
            let at = 64 + (produced.wrapping_add(index) as usize % slots) * abi.slot_size();
            let mut id = [0; 8];
            ring_page.pages.read_bytes(at, &mut id).expect("inside the page");
            let id = u64::from_le_bytes(id);
            if id != 5 {
                let count = ids.get_mut(&id).expect("the response of a request of the record");
                *count += 1;
                assert_eq!(*count, 1, "responses to request {id}");
            }
        }
    }
    domains.assert_backend_is_empty();
    ring_page.assert_unmapped();
    data.assert_unmapped();
});
