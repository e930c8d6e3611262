//! Packets cause no allocation once a queue has processed every kind of packet: counted in both
//! directions, with copied and with staged pages.

#[path = "common/control.rs"]
mod control;

mod common;

use allocation_counter::measure;
use common::{ALL, DATA_PAGES, Setup, drain, pattern};
use control::many;
use pvio_netback::port::Offload;
use pvio_ring::proto::netif::{CtrlAsk, CtrlStatus, GrefEntry, GrefList, rsp};

const ROUNDS: u64 = 64;
/// Limit of allocations over all rounds. A list may still grow a few times; an allocation for each
/// packet of any kind would be hundreds.
const GROWTH: u64 = 4;

/// Moves packets of one, three and 17 slots in each direction. Returns the number of allocations.
fn round(setup: &mut Setup) -> u64 {
    let frames = [60, 9000, 65000].map(|len| pattern(len, len));
    let mut counted = 0;
    for frame in &frames {
        let parts: Vec<&[u8]> = frame.chunks(4096).collect();
        let packet = setup.guest.packet(0, &parts);
        setup.guest.send(&packet);
        setup.guest.post(32..32 + parts.len());
        setup.inject(frame, Offload::default());
        let (queue, port) = (&mut setup.queue, &mut setup.port);
        let served = measure(|| {
            let _ = queue.poll(port, 256).unwrap();
        });
        counted += served.count_total;
        assert!(setup.guest.answers().iter().all(|(_, status)| *status == rsp::OKAY));
        assert_eq!(setup.guest.received().len(), parts.len());
        drain(&mut setup.wire);
    }
    counted
}

fn allocates_nothing(setup: &mut Setup) {
    // The counter works: a vector that is created inside is counted.
    assert_eq!(measure(|| drop(std::hint::black_box(vec![0_u8; 9]))).count_total, 1);
    let first: u64 = (0..8).map(|_| round(setup)).sum();
    let more: u64 = (0..ROUNDS).map(|_| round(setup)).sum();
    assert!(more <= GROWTH, "{first} at first, then {more} allocations for {} packets", 6 * ROUNDS);
    assert_eq!(setup.stats.dropped_in_all(), 0);
    assert_eq!(setup.stats.rx_packets(), setup.stats.tx_packets());
}

#[test]
fn copied_packet_allocates_no_memory() {
    let mut setup = common::setup(ALL);
    allocates_nothing(&mut setup);
    assert_eq!(setup.stats.staged(), 0);
}

#[test]
fn packet_in_staged_pages_allocates_no_memory() {
    let mut m = many(ALL, 1);
    let grefs = m.queues[0].guest.grefs.iter();
    let entries: Vec<GrefEntry> =
        grefs.map(|gref| GrefEntry { gref: *gref, read_only: false, status: 0 }).collect();
    m.write_list(&entries);
    let list = GrefList { queue: 0, page: m.control.gref, len: DATA_PAGES as u32 };
    assert_eq!(m.set(CtrlAsk::AddGrefMapping(list)), CtrlStatus::Success);
    allocates_nothing(&mut m.queues[0]);
    assert!(m.queues[0].stats.staged() > 38 * ROUNDS);
}
