//! Both sides of our ring against C programs that use `ring.h`'s own macros, in another process,
//! through shared memory and with real waiting. Needs a C compiler and Xen's public headers
//! (Debian: `libxen-dev`); prints SKIPPED without them.

mod support;

use core::sync::atomic::Ordering;
use pvio_ring::shm::Region;
use pvio_ring::{BackRing, FrontRing};
use std::collections::HashSet;
use std::process::Command;
use support::c_compiler::{can_compile, compile};
use support::c_peer::Peer;
use support::items::{Blk, Kind, Rx, Tx, mix};
use support::shared_file::SharedFile;

const ITEMS: u64 = 20_000;
/// Besides 0: 256 and 3 items before the indices wrap, so that 20,000 items cross the wrap.
const STARTS: [u32; 3] = [0, 0xffff_ff00, 0xffff_fffd];

#[test]
fn c_frontend_exchanges_with_pvio_backend() {
    exchange_all("back ends", "front", our_back_end::<Blk>, our_back_end::<Tx>, our_back_end::<Rx>);
}

#[test]
fn pvio_frontend_exchanges_with_c_backend() {
    exchange_all(
        "front ends",
        "back",
        our_front_end::<Blk>,
        our_front_end::<Tx>,
        our_front_end::<Rx>,
    );
}

/// One side of an exchange: a mapped ring, the peer's start, the initial index.
type End = fn(&SharedFile, &mut dyn FnMut() -> Peer, u32) -> Peer;

fn exchange_all(test: &str, c_end: &str, blk: End, tx: End, rx: End) {
    if !can_compile(test) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let program = compile("peer.c", &[], dir.path());
    let mut waits = [0, 0];
    for (kind, end, page_counts) in
        [(Blk::NAME, blk, &[1, 8][..]), (Tx::NAME, tx, &[1]), (Rx::NAME, rx, &[1])]
    {
        for start in STARTS {
            for &pages in page_counts {
                let path = dir.path().join("ring");
                let file = std::fs::File::options()
                    .read(true)
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .open(&path)
                    .unwrap();
                let memory = SharedFile::map(&file, pages).unwrap();
                let mut start_peer = || {
                    let numbers = [pages.to_string(), start.to_string(), ITEMS.to_string()];
                    Peer::start(Command::new(&program).args([c_end, kind]).arg(&path).args(numbers))
                };
                let peer = end(&memory, &mut start_peer, start);
                waits[0] += peer.waits;
                let says = peer.finish();
                assert!(says.starts_with(&format!("ok items={ITEMS} ")), "{says}");
                waits[1] += field(&says, "waits");
            }
        }
    }
    // An exchange in which neither side slept would not test for lost notifications.
    println!("ours slept {} times, C slept {} times", waits[0], waits[1]);
    assert!(waits[0] > 0 && waits[1] > 0, "one side never slept: {waits:?}");
}

fn field(says: &str, name: &str) -> u64 {
    let value = says.split_whitespace().find_map(|w| w.strip_prefix(name)?.strip_prefix('='));
    value.expect(name).parse().expect(name)
}

/// Sends every request and checks every response, sleeping whenever that is allowed.
fn our_front_end<K: Kind>(
    memory: &SharedFile,
    start_peer: &mut dyn FnMut() -> Peer,
    start: u32,
) -> Peer {
    let mut ring = FrontRing::init_at(memory.clone(), K::SLOT_SIZE, start).unwrap();
    let mut peer = start_peer();
    let slots = u64::from(ring.layout().slots());
    let (mut sent, mut done) = (0, 0);
    let mut open = HashSet::new();
    let mut oldest = 0;
    while done < ITEMS {
        let burst = 1 + mix(sent, 7) % if mix(sent, 8).is_multiple_of(4) { slots } else { 4 };
        for _ in 0..burst {
            if sent == ITEMS || ring.free() == 0 {
                break;
            }
            K::push_request(&mut ring, sent).unwrap();
            open.insert(sent);
            sent += 1;
        }
        if ring.publish() {
            peer.notify();
        }
        loop {
            while let Some(mut slot) = ring.pop().unwrap() {
                let n = K::check_response(&mut slot, oldest);
                assert!(open.remove(&n), "response {n} is duplicate or without a request");
                done += 1;
                while oldest < sent && !open.contains(&oldest) {
                    oldest += 1;
                }
            }
            if !ring.final_check().unwrap() {
                break;
            }
        }
        let may = ring.free() == 0 || sent == ITEMS || mix(sent, 9).is_multiple_of(4);
        if sent != done && may {
            peer.wait();
        }
    }
    assert_eq!(ring.next_index(), start.wrapping_add(ITEMS as u32));
    peer
}

/// Checks every request and responds to it, sleeping whenever that is allowed.
fn our_back_end<K: Kind>(
    memory: &SharedFile,
    start_peer: &mut dyn FnMut() -> Peer,
    start: u32,
) -> Peer {
    let mut peer = start_peer();
    // The first notification means that the ring can be attached to; its start index is read there.
    peer.wait();
    peer.waits = 0;
    assert_eq!(memory.load_u32(8, Ordering::Acquire), Some(start), "rsp_prod");
    let mut ring = BackRing::attach(memory.clone(), K::SLOT_SIZE).unwrap();
    let slots = u64::from(ring.layout().slots());
    let mut taken = 0;
    while taken < ITEMS {
        let (first, most) = (taken, 1 + mix(taken, 10) % slots);
        while taken - first < most {
            let Some(mut slot) = ring.pop().unwrap() else { break };
            K::check_request(&mut slot, taken);
            taken += 1;
        }
        for i in first..taken {
            K::push_response(&mut ring, if K::IN_ORDER { i } else { taken - 1 - (i - first) })
                .unwrap();
        }
        if ring.publish() {
            peer.notify();
        }
        if !ring.final_check().unwrap() && taken < ITEMS {
            peer.wait();
        }
    }
    peer
}
