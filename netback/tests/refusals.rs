//! Guest to port: what is dropped, what ends the vif, each row of the rules.

mod common;

use common::{ALL, Guest, Setup, pattern, setup, setup_at, tcp};
use pvio_grant_table::GrantRef;
use pvio_netback::fault::{DropReason, Fault, QueueError};
use pvio_netback::port::{NetPort, Offload};
use pvio_ring::RingFault;
use pvio_ring::proto::netif::{ExtraFault, TxFlags, rsp};
use pvio_ring::shm::Region;
use std::sync::atomic::Ordering;

/// A row of the rules of Linux's netback: what the guest does, and what comes of it.
struct Row {
    name: &'static str,
    send: fn(&mut Guest),
    fate: Fate,
}

enum Fate {
    /// Dropped for this reason; these slots are answered, in this order.
    Drop(DropReason, &'static [(u16, i16)]),
    /// The vif ends with this code.
    Fatal(Fault, &'static str),
}

const ERROR: i16 = rsp::ERROR;
const NULL: i16 = rsp::NULL;

fn with_extra(guest: &mut Guest, extras: &[[u8; 8]]) {
    let mut slot = guest.slot(0, 0, &tcp(false, 100));
    slot.flags = TxFlags::EXTRA_INFO | TxFlags::CSUM_BLANK;
    guest.push(&[slot]);
    for extra in extras {
        guest.tx.push(extra).unwrap();
    }
    let _ = guest.tx.publish();
}

const GSO: [u8; 8] = [1, 0, 0xb4, 5, 1, 0, 0, 0];

const ROWS: &[Row] = &[
    Row {
        name: "more_data beyond the produced slots",
        send: |g| {
            let mut slot = g.slot(0, 0, &[1; 60]);
            slot.flags = TxFlags::MORE_DATA;
            g.send(&[slot]);
        },
        fate: Fate::Fatal(Fault::MissingSlots { have: 1 }, "tx-slots-missing"),
    },
    Row {
        name: "more_data beyond the produced slots of a packet that was to be dropped",
        send: |g| {
            let part: &[u8] = &[1; 60];
            let mut packet = g.packet(0, &[part; 20]);
            packet[19].flags = TxFlags::MORE_DATA;
            g.send(&packet);
        },
        fate: Fate::Fatal(Fault::MissingSlots { have: 20 }, "tx-slots-missing"),
    },
    Row {
        name: "only slot crosses its page",
        send: |g| {
            let mut slot = g.slot(0, 0, &[1; 60]);
            slot.offset = 4096 - 59;
            g.send(&[slot]);
        },
        fate: Fate::Fatal(Fault::CrossesPage { offset: 4037, size: 60 }, "tx-slot-crosses-page"),
    },
    Row {
        name: "offset and size at their largest",
        send: |g| {
            let mut slot = g.slot(0, 0, &[1; 60]);
            (slot.offset, slot.size) = (u16::MAX, u16::MAX);
            g.send(&[slot]);
        },
        fate: Fate::Fatal(
            Fault::CrossesPage { offset: u16::MAX, size: u16::MAX },
            "tx-slot-crosses-page",
        ),
    },
    Row {
        name: "later slot crosses its page",
        send: |g| {
            let mut packet = g.packet(0, &[&[1; 60], &[2; 60]]);
            packet[1].offset = 4040;
            g.send(&packet);
        },
        fate: Fate::Fatal(Fault::CrossesPage { offset: 4040, size: 60 }, "tx-slot-crosses-page"),
    },
    Row {
        name: "later slot crosses its page, in a packet that was to be dropped",
        send: |g| {
            let mut packet = g.packet(0, &[&[1; 60], &[2; 60], &[3; 60]]);
            packet[0].size = 30;
            packet[2].offset = 4040;
            g.send(&packet);
        },
        fate: Fate::Fatal(Fault::CrossesPage { offset: 4040, size: 60 }, "tx-slot-crosses-page"),
    },
    Row {
        name: "what the others leave for the first slot crosses its page",
        send: |g| {
            let mut packet = g.packet(0, &[&[1; 60], &[2; 60]]);
            packet[0].size = 4096 + 61;
            g.send(&packet);
        },
        fate: Fate::Fatal(Fault::CrossesPage { offset: 0, size: 4097 }, "tx-slot-crosses-page"),
    },
    Row {
        name: "announced extra missing",
        send: |g| with_extra(g, &[]),
        fate: Fate::Fatal(Fault::MissingExtra, "tx-extra-missing"),
    },
    Row {
        name: "second announced extra missing",
        send: |g| with_extra(g, &[[4, 1, 0, 0, 0, 0, 0, 0]]),
        fate: Fate::Fatal(Fault::MissingExtra, "tx-extra-missing"),
    },
    Row {
        name: "extra of type 0",
        send: |g| with_extra(g, &[[0; 8]]),
        fate: Fate::Fatal(Fault::Extra(ExtraFault::Type(0)), "tx-extra-type"),
    },
    Row {
        name: "extra of the first type nobody defined",
        send: |g| with_extra(g, &[[6, 0, 0, 0, 0, 0, 0, 0]]),
        fate: Fate::Fatal(Fault::Extra(ExtraFault::Type(6)), "tx-extra-type"),
    },
    Row {
        name: "GSO of no size",
        send: |g| with_extra(g, &[[1, 0, 0, 0, 1, 0, 0, 0]]),
        fate: Fate::Fatal(Fault::Extra(ExtraFault::GsoSize), "tx-gso-size"),
    },
    Row {
        name: "GSO of an unknown type",
        send: |g| with_extra(g, &[[1, 0, 1, 0, 3, 0, 0, 0]]),
        fate: Fate::Fatal(Fault::Extra(ExtraFault::GsoType(3)), "tx-gso-type"),
    },
    Row {
        name: "GSO that was not negotiated",
        send: |g| with_extra(g, &[GSO]),
        fate: Fate::Drop(DropReason::TxGso, &[(0, ERROR), (0, NULL)]),
    },
    Row {
        name: "an extra segment that says more without end",
        send: |g| with_extra(g, &[[4, 1, 0, 0, 0, 0, 0, 0]; 255]),
        fate: Fate::Fatal(Fault::MissingExtra, "tx-extra-missing"),
    },
    Row {
        name: "more slots than are carried, and an extra",
        send: |g| {
            let part: &[u8] = &[1; 60];
            let mut packet = g.packet(0, &[part; 21]);
            packet[0].flags |= TxFlags::EXTRA_INFO | TxFlags::CSUM_BLANK;
            g.push(&packet[..1]);
            g.tx.push(&GSO).unwrap();
            g.send(&packet[1..]);
        },
        fate: Fate::Drop(
            DropReason::TxSlots,
            &[
                (0, ERROR),
                (1, ERROR),
                (2, ERROR),
                (3, ERROR),
                (4, ERROR),
                (5, ERROR),
                (6, ERROR),
                (7, ERROR),
                (8, ERROR),
                (9, ERROR),
                (10, ERROR),
                (11, ERROR),
                (12, ERROR),
                (13, ERROR),
                (14, ERROR),
                (15, ERROR),
                (16, ERROR),
                (17, ERROR),
                (18, ERROR),
                (19, ERROR),
                (20, ERROR),
                (0, NULL),
            ],
        ),
    },
    Row {
        name: "multicast control that was not offered",
        send: |g| with_extra(g, &[[2, 1, 1, 0, 0x5e, 0, 0, 1], [4, 0, 0, 0, 0, 0, 0, 0]]),
        fate: Fate::Drop(DropReason::TxMulticast, &[(0, ERROR), (0, NULL), (0, NULL)]),
    },
    Row {
        name: "slot larger than the packet (a total that wrapped)",
        send: |g| {
            let mut packet = g.packet(0, &[&[1; 60], &[2; 60], &[3; 60]]);
            packet[0].size = 59;
            g.send(&packet);
        },
        fate: Fate::Drop(DropReason::TxSlotBeyondPacket, &[(0, ERROR), (1, ERROR), (2, ERROR)]),
    },
    Row {
        name: "shorter than an Ethernet header",
        send: |g| {
            let slot = g.slot(0, 0, &[1; 13]);
            g.send(&[slot]);
        },
        fate: Fate::Drop(DropReason::TxShort, &[(0, ERROR)]),
    },
    Row {
        name: "no bytes at all",
        send: |g| {
            let slot = g.slot(0, 0, &[]);
            g.send(&[slot]);
        },
        fate: Fate::Drop(DropReason::TxShort, &[(0, ERROR)]),
    },
    Row {
        name: "page that is not granted",
        send: |g| {
            let mut packet = g.packet(0, &[&[1; 60], &[2; 60], &[3; 60]]);
            packet[1].gref = GrantRef(31_000);
            g.send(&packet);
        },
        fate: Fate::Drop(DropReason::TxCopy, &[(0, ERROR), (1, ERROR), (2, ERROR)]),
    },
    Row {
        name: "grant reference beyond the table",
        send: |g| {
            let mut slot = g.slot(0, 0, &[1; 60]);
            slot.gref = GrantRef(u32::MAX);
            g.send(&[slot]);
        },
        fate: Fate::Drop(DropReason::TxCopy, &[(0, ERROR)]),
    },
    Row {
        name: "blank checksum where there is none",
        send: |g| {
            let mut slot = g.slot(0, 0, &[1; 60]);
            slot.flags = TxFlags::CSUM_BLANK;
            g.send(&[slot]);
        },
        fate: Fate::Drop(DropReason::TxChecksum, &[(0, ERROR)]),
    },
];

#[test]
fn every_row_of_the_fatal_and_drop_table() {
    for row in ROWS {
        // Also across the wrap of the indices.
        for start in [0, u32::MAX - 1] {
            let mut s = setup_at(ALL, start, false);
            (row.send)(&mut s.guest);
            let result = s.queue.poll(&mut s.port, 64);
            match &row.fate {
                Fate::Fatal(fault, code) => {
                    assert_eq!(result, Err(QueueError::Fault(*fault)), "{}", row.name);
                    assert_eq!(fault.code(), *code, "{}", row.name);
                    assert_stays_dead(&mut s, *fault);
                }
                Fate::Drop(reason, answers) => {
                    assert!(result.is_ok(), "{}: {result:?}", row.name);
                    assert_eq!(s.stats.dropped(*reason), 1, "{}", row.name);
                    assert_eq!(s.stats.dropped_in_all(), 1, "{}", row.name);
                    assert_eq!(s.guest.answers(), *answers, "{}", row.name);
                    assert_eq!(s.sent(), [], "{}", row.name);
                    assert_goes_on(&mut s);
                }
            }
        }
    }
}

#[test]
fn a_producer_ahead_of_the_ring_ends_the_vif() {
    for ahead in [257, 1 << 31, u32::MAX] {
        let mut s = setup(ALL);
        s.guest.tx_page.store_u32(0, ahead, Ordering::SeqCst);
        let fault = Fault::TxRing(RingFault::ProducerOverflow { prod: ahead, ahead, most: 256 });
        assert_eq!(s.queue.poll(&mut s.port, 64), Err(QueueError::Fault(fault)));
        assert_stays_dead(&mut s, fault);
    }
}

/// Nothing more is read, answered or sent, and every buffer is back with the port.
fn assert_stays_dead(s: &mut Setup, fault: Fault) {
    assert_eq!(s.queue.poll(&mut s.port, 64), Err(QueueError::Fault(fault)));
    assert_eq!(s.queue.may_sleep(), Err(QueueError::Fault(fault)));
    assert_eq!(s.sent(), []);
    assert_eq!(s.guest.answers(), []);
    let buffers: Vec<_> = std::iter::from_fn(|| s.port.reserve().ok()).collect();
    assert_eq!(buffers.len(), 128, "a buffer was lost");
}

fn assert_goes_on(s: &mut Setup) {
    let frame = pattern(60, 9);
    let slot = s.guest.slot(50, 0, &frame);
    s.guest.send(&[slot]);
    s.poll();
    assert_eq!(s.sent(), [(frame, Offload::default())]);
    assert_eq!(s.guest.answers(), [(50, rsp::OKAY)]);
}

#[test]
fn packets_before_a_fatal_one_are_not_sent_twice_nor_answered() {
    let mut s = setup(ALL);
    let good = s.guest.slot(0, 0, &[1; 60]);
    let mut bad = s.guest.slot(1, 0, &[1; 60]);
    bad.offset = 4095;
    s.guest.send(&[good, bad]);
    let fault = Fault::CrossesPage { offset: 4095, size: 60 };
    assert_eq!(s.queue.poll(&mut s.port, 64), Err(QueueError::Fault(fault)));
    assert_stays_dead(&mut s, fault);
}
