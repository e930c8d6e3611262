//! Random guests: for any contents of the rings, the vif works or ends, and nothing else is
//! affected.

mod common;

use common::{ALL, FRONT, Setup, pattern, setup_deep};
use proptest::prelude::*;
use pvio_netback::port::{NetPort, Offload};
use pvio_netback::{Features, Queue};
use pvio_ring::proto::netif::TxRequest;
use pvio_ring::shm::Region;
use std::sync::Arc;
use std::sync::atomic::Ordering;

const RING: usize = 4096;
const DEPTH: usize = 16;

/// Returns the offset of a slot in its page.
fn slot_at(index: u32, size: usize) -> usize {
    64 + (index as usize & 255) * size
}

/// Generates a slot that is random, or nearly valid.
fn slot() -> impl Strategy<Value = [u8; 12]> {
    let nearly = (0..64_u32, 0..4200_u16, 0..16_u16, any::<u16>(), 0..5000_u16).prop_map(
        |(gref, offset, flags, id, size)| {
            let mut raw = TxRequest { offset, id, size, ..TxRequest::default() }.to_bytes();
            raw[..4].copy_from_slice(&(gref + 8).to_le_bytes());
            raw[6..8].copy_from_slice(&flags.to_le_bytes());
            raw
        },
    );
    let extra = (0..6_u8, 0..2_u8, any::<[u8; 6]>()).prop_map(|(kind, more, rest)| {
        let mut raw = [0; 12];
        (raw[0], raw[1]) = (kind, more);
        raw[2..8].copy_from_slice(&rest);
        raw
    });
    prop_oneof![4 => nearly, 1 => extra, 1 => any::<[u8; 12]>()]
}

/// Checks that every buffer is accounted for and that there are no more responses than requests.
fn check(s: &mut Setup, produced: u32) {
    let answered = s.guest.tx_page.load_u32(8, Ordering::SeqCst).unwrap();
    assert!(
        answered.wrapping_sub(produced) as i32 <= 0,
        "{answered} responses for {produced} requests"
    );
    s.sent();
    let free: Vec<_> = std::iter::from_fn(|| s.port.reserve().ok()).collect();
    assert_eq!(free.len(), DEPTH, "a buffer was lost");
    free.into_iter().for_each(|buf| s.port.unreserve(buf));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn random_tx_slots_are_handled_in_bounded_polls(
        slots in prop::collection::vec(slot(), 1..256),
        start in prop_oneof![Just(0), Just(u32::MAX - 20), any::<u32>()],
        gso in any::<bool>(),
    ) {
        let mut s = setup_deep(Features { sends_gso_v4: gso, sends_gso_v6: gso, ..ALL }, start, false, DEPTH);
        for (i, raw) in slots.iter().enumerate() {
            let at = slot_at(start.wrapping_add(i as u32), 12);
            s.guest.tx_page.write_words(at, raw).unwrap();
        }
        let produced = start.wrapping_add(slots.len() as u32);
        s.guest.tx_page.store_u32(0, produced, Ordering::SeqCst);
        let mut turns = 0;
        while let Ok(progress) = s.queue.poll(&mut s.port, 64) {
            check(&mut s, produced);
            turns += 1;
            prop_assert!(turns < 256, "poll does not finish");
            if !progress.any() {
                break;
            }
        }
        check(&mut s, produced);
    }

    #[test]
    fn rings_of_random_bytes_leak_no_port_buffer(
        tx in prop::collection::vec(any::<u8>(), RING),
        rx in prop::collection::vec(any::<u8>(), RING),
        near in any::<Option<(u8, u8)>>(),
        packets in 0..8_usize,
    ) {
        let mut s = setup_deep(ALL, 0, true, DEPTH);
        s.guest.tx_page.write_bytes(0, &tx).unwrap();
        s.guest.rx_page.write_bytes(0, &rx).unwrap();
        if let Some((t, r)) = near {
            // Valid producer indices, so that the slots are read.
            s.guest.tx_page.store_u32(0, t.into(), Ordering::SeqCst);
            s.guest.rx_page.store_u32(0, r.into(), Ordering::SeqCst);
        }
        let again = Queue::<_, Box<[u8]>>::attach(
            s.back.clone(), FRONT, &s.guest.refs, ALL, Arc::default(),
        );
        prop_assert!(again.is_err(), "the channels are bound already");
        (0..packets).for_each(|i| s.inject(&pattern(5000 * i + 60, i), Offload::default()));
        for _ in 0..64 {
            match s.queue.poll(&mut s.port, 64) {
                Ok(progress) if progress.any() => {}
                Ok(_) => { let _ = s.queue.final_check(); }
                Err(_) => break,
            }
        }
        s.queue.drop_backlog(&mut s.port);
        while let Some(left) = s.port.receive() {
            s.port.recycle(left.buf);
        }
        let free: Vec<_> = std::iter::from_fn(|| s.wire.reserve().ok()).collect();
        prop_assert_eq!(free.len(), DEPTH, "a buffer was lost");
    }
}
