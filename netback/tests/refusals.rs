//! The transmit path: which packets are dropped, and what ends the vif. There is a test for each
//! rule of Linux's netback, with its counter and its reason.

mod common;

use common::{ALL, Guest, Setup, pattern, setup, setup_at, tcp};
use pvio_grant_table::GrantRef;
use pvio_netback::fault::{DropReason, Fault, QueueError};
use pvio_netback::port::memory::MemoryPort;
use pvio_netback::port::{NetPort, Offload, Packet, PortError, WouldBlock};
use pvio_netback::queue::SEGMENT_MIN;
use pvio_ring::RingFault;
use pvio_ring::proto::netif::{ExtraFault, TxFlags, rsp};
use pvio_ring::shm::Region;
use pvio_sim::local::memory::LocalPages;
use std::sync::atomic::Ordering;

/// One rule of Linux's netback: the guest's action and its effect.
struct Row {
    send: fn(&mut Guest),
    fate: Fate,
}

enum Fate {
    /// Dropped for this reason, with these responses, in this order.
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

fn check(row: &Row) {
    // With the second start, the slots cross the wrap of the indices.
    for start in [0, u32::MAX - 1] {
        let mut s = setup_at(ALL, start, false);
        (row.send)(&mut s.guest);
        let result = s.queue.poll(&mut s.port, 64);
        match &row.fate {
            Fate::Fatal(fault, code) => {
                assert_eq!(result, Err(QueueError::Fault(*fault)));
                assert_eq!(fault.code(), *code);
                assert_eq!(s.stats.ended(*fault), 1);
                assert_stays_dead(&mut s, *fault);
                assert_eq!(s.stats.ended(*fault), 1, "once");
            }
            Fate::Drop(reason, answers) => {
                assert!(result.is_ok(), "{result:?}");
                assert_eq!(s.stats.dropped(*reason), 1);
                assert_eq!(s.stats.dropped_in_all(), 1);
                assert_eq!(s.guest.answers(), *answers);
                assert_eq!(s.sent(), []);
                assert_goes_on(&mut s);
            }
        }
    }
}

#[test]
fn more_data_beyond_produced_slots_ends_vif() {
    check(&Row {
        send: |g| {
            let mut slot = g.slot(0, 0, &[1; 60]);
            slot.flags = TxFlags::MORE_DATA;
            g.send(&[slot]);
        },
        fate: Fate::Fatal(Fault::MissingSlots { have: 1 }, "tx-slots-missing"),
    });
}

#[test]
fn more_data_beyond_produced_slots_of_packet_to_be_dropped_ends_vif() {
    check(&Row {
        send: |g| {
            let part: &[u8] = &[1; 60];
            let mut packet = g.packet(0, &[part; 20]);
            packet[19].flags = TxFlags::MORE_DATA;
            g.send(&packet);
        },
        fate: Fate::Fatal(Fault::MissingSlots { have: 20 }, "tx-slots-missing"),
    });
}

#[test]
fn only_slot_crossing_its_page_ends_vif() {
    check(&Row {
        send: |g| {
            let mut slot = g.slot(0, 0, &[1; 60]);
            slot.offset = 4096 - 59;
            g.send(&[slot]);
        },
        fate: Fate::Fatal(Fault::CrossesPage { offset: 4037, size: 60 }, "tx-slot-crosses-page"),
    });
}

#[test]
fn slot_with_maximum_offset_and_size_ends_vif() {
    check(&Row {
        send: |g| {
            let mut slot = g.slot(0, 0, &[1; 60]);
            (slot.offset, slot.size) = (u16::MAX, u16::MAX);
            g.send(&[slot]);
        },
        fate: Fate::Fatal(
            Fault::CrossesPage { offset: u16::MAX, size: u16::MAX },
            "tx-slot-crosses-page",
        ),
    });
}

#[test]
fn later_slot_crossing_its_page_ends_vif() {
    check(&Row {
        send: |g| {
            let mut packet = g.packet(0, &[&[1; 60], &[2; 60]]);
            packet[1].offset = 4040;
            g.send(&packet);
        },
        fate: Fate::Fatal(Fault::CrossesPage { offset: 4040, size: 60 }, "tx-slot-crosses-page"),
    });
}

#[test]
fn later_slot_crossing_its_page_in_packet_to_be_dropped_ends_vif() {
    check(&Row {
        send: |g| {
            let mut packet = g.packet(0, &[&[1; 60], &[2; 60], &[3; 60]]);
            packet[0].size = 30;
            packet[2].offset = 4040;
            g.send(&packet);
        },
        fate: Fate::Fatal(Fault::CrossesPage { offset: 4040, size: 60 }, "tx-slot-crosses-page"),
    });
}

#[test]
fn remainder_of_first_slot_crossing_its_page_ends_vif() {
    check(&Row {
        send: |g| {
            let mut packet = g.packet(0, &[&[1; 60], &[2; 60]]);
            packet[0].size = 4096 + 61;
            g.send(&packet);
        },
        fate: Fate::Fatal(Fault::CrossesPage { offset: 0, size: 4097 }, "tx-slot-crosses-page"),
    });
}

#[test]
fn missing_extra_segment_ends_vif() {
    check(&Row {
        send: |g| with_extra(g, &[]),
        fate: Fate::Fatal(Fault::MissingExtra, "tx-extra-missing"),
    });
}

#[test]
fn missing_second_extra_segment_ends_vif() {
    check(&Row {
        send: |g| with_extra(g, &[[4, 1, 0, 0, 0, 0, 0, 0]]),
        fate: Fate::Fatal(Fault::MissingExtra, "tx-extra-missing"),
    });
}

#[test]
fn extra_segment_of_type_0_ends_vif() {
    check(&Row {
        send: |g| with_extra(g, &[[0; 8]]),
        fate: Fate::Fatal(Fault::Extra(ExtraFault::Type(0)), "tx-extra-type"),
    });
}

#[test]
fn extra_segment_of_undefined_type_ends_vif() {
    check(&Row {
        send: |g| with_extra(g, &[[6, 0, 0, 0, 0, 0, 0, 0]]),
        fate: Fate::Fatal(Fault::Extra(ExtraFault::Type(6)), "tx-extra-type"),
    });
}

#[test]
fn gso_of_size_0_ends_vif() {
    check(&Row {
        send: |g| with_extra(g, &[[1, 0, 0, 0, 1, 0, 0, 0]]),
        fate: Fate::Fatal(Fault::Extra(ExtraFault::GsoSize), "tx-gso-size"),
    });
}

#[test]
fn gso_below_minimum_segment_size_is_dropped() {
    assert_eq!(SEGMENT_MIN, 8);
    check(&Row {
        send: |g| with_extra(g, &[[1, 0, 7, 0, 1, 0, 0, 0]]),
        fate: Fate::Drop(DropReason::TxGsoSmall, &[(0, ERROR), (0, NULL)]),
    });
    check(&Row {
        send: |g| with_extra(g, &[[1, 0, 1, 0, 2, 0, 0, 0]]),
        fate: Fate::Drop(DropReason::TxGsoSmall, &[(0, ERROR), (0, NULL)]),
    });
}

#[test]
fn gso_of_unknown_type_ends_vif() {
    check(&Row {
        send: |g| with_extra(g, &[[1, 0, 1, 0, 3, 0, 0, 0]]),
        fate: Fate::Fatal(Fault::Extra(ExtraFault::GsoType(3)), "tx-gso-type"),
    });
}

#[test]
fn gso_not_negotiated_is_dropped() {
    check(&Row {
        send: |g| with_extra(g, &[GSO]),
        fate: Fate::Drop(DropReason::TxGso, &[(0, ERROR), (0, NULL)]),
    });
}

#[test]
fn endless_extra_segments_end_vif() {
    check(&Row {
        send: |g| with_extra(g, &[[4, 1, 0, 0, 0, 0, 0, 0]; 255]),
        fate: Fate::Fatal(Fault::MissingExtra, "tx-extra-missing"),
    });
}

#[test]
fn packet_over_slot_limit_with_extra_segment_is_dropped() {
    check(&Row {
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
    });
}

#[test]
fn multicast_control_not_advertised_is_dropped() {
    check(&Row {
        send: |g| with_extra(g, &[[2, 1, 1, 0, 0x5e, 0, 0, 1], [4, 0, 0, 0, 0, 0, 0, 0]]),
        fate: Fate::Drop(DropReason::TxMulticast, &[(0, ERROR), (0, NULL), (0, NULL)]),
    });
}

#[test]
fn slot_larger_than_packet_total_is_dropped() {
    check(&Row {
        send: |g| {
            let mut packet = g.packet(0, &[&[1; 60], &[2; 60], &[3; 60]]);
            packet[0].size = 59;
            g.send(&packet);
        },
        fate: Fate::Drop(DropReason::TxSlotBeyondPacket, &[(0, ERROR), (1, ERROR), (2, ERROR)]),
    });
}

#[test]
fn packet_shorter_than_ethernet_header_is_dropped() {
    check(&Row {
        send: |g| {
            let slot = g.slot(0, 0, &[1; 13]);
            g.send(&[slot]);
        },
        fate: Fate::Drop(DropReason::TxShort, &[(0, ERROR)]),
    });
}

#[test]
fn packet_of_0_bytes_is_dropped() {
    check(&Row {
        send: |g| {
            let slot = g.slot(0, 0, &[]);
            g.send(&[slot]);
        },
        fate: Fate::Drop(DropReason::TxShort, &[(0, ERROR)]),
    });
}

#[test]
fn packet_with_ungranted_page_is_dropped() {
    check(&Row {
        send: |g| {
            let mut packet = g.packet(0, &[&[1; 60], &[2; 60], &[3; 60]]);
            packet[1].gref = GrantRef(31_000);
            g.send(&packet);
        },
        fate: Fate::Drop(DropReason::TxCopy, &[(0, ERROR), (1, ERROR), (2, ERROR)]),
    });
}

#[test]
fn packet_with_grant_reference_beyond_table_is_dropped() {
    check(&Row {
        send: |g| {
            let mut slot = g.slot(0, 0, &[1; 60]);
            slot.gref = GrantRef(u32::MAX);
            g.send(&[slot]);
        },
        fate: Fate::Drop(DropReason::TxCopy, &[(0, ERROR)]),
    });
}

#[test]
fn blank_checksum_without_transport_header_is_dropped() {
    check(&Row {
        send: |g| {
            let mut slot = g.slot(0, 0, &[1; 60]);
            slot.flags = TxFlags::CSUM_BLANK;
            g.send(&[slot]);
        },
        fate: Fate::Drop(DropReason::TxChecksum, &[(0, ERROR)]),
    });
}

#[test]
fn tx_producer_overflow_ends_vif() {
    for ahead in [257, 1 << 31, u32::MAX] {
        let mut s = setup(ALL);
        s.guest.tx_page.store_u32(0, ahead, Ordering::SeqCst);
        let fault = Fault::TxRing(RingFault::ProducerOverflow { prod: ahead, ahead, most: 256 });
        assert_eq!(s.queue.poll(&mut s.port, 64), Err(QueueError::Fault(fault)));
        assert_eq!(s.stats.ended(fault), 1);
        assert_stays_dead(&mut s, fault);
    }
}

/// A port during whose calls the guest overwrites its producer index.
struct Overwriting<'a> {
    port: &'a mut MemoryPort,
    tx_page: &'a LocalPages,
    prod: u32,
}

impl NetPort for Overwriting<'_> {
    type Buf = Box<[u8]>;
    const HEADROOM: usize = MemoryPort::HEADROOM;

    fn reserve(&mut self) -> Result<Self::Buf, WouldBlock> {
        self.tx_page.store_u32(0, self.prod, Ordering::SeqCst);
        self.port.reserve()
    }

    fn unreserve(&mut self, buf: Self::Buf) {
        self.port.unreserve(buf);
    }

    fn send(&mut self, packet: Packet<Self::Buf>) -> Result<(), PortError> {
        self.port.send(packet)
    }

    fn receive(&mut self) -> Option<Packet<Self::Buf>> {
        self.port.receive()
    }

    fn recycle(&mut self, buf: Self::Buf) {
        self.port.recycle(buf);
    }

    fn flush(&mut self) {
        self.port.flush();
    }
}

#[test]
fn tx_producer_overflow_after_gathered_packet_returns_its_buffer() {
    let mut s = setup(ALL);
    let slot = s.guest.slot(0, 0, &pattern(60, 0));
    s.guest.send(&[slot]);
    let fault = Fault::TxRing(RingFault::ProducerOverflow { prod: 300, ahead: 299, most: 255 });
    let mut port = Overwriting { port: &mut s.port, tx_page: &s.guest.tx_page, prod: 300 };
    assert_eq!(s.queue.poll(&mut port, 64), Err(QueueError::Fault(fault)));
    assert_stays_dead(&mut s, fault);
}

/// Checks that no more requests are read, no responses written, no packets sent, and that every
/// buffer was returned to the port.
fn assert_stays_dead(s: &mut Setup, fault: Fault) {
    assert_eq!(s.queue.poll(&mut s.port, 64), Err(QueueError::Fault(fault)));
    assert_eq!(s.queue.final_check(), Err(QueueError::Fault(fault)));
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
fn packets_before_fatal_packet_are_not_sent_twice_or_completed() {
    let mut s = setup(ALL);
    let good = s.guest.slot(0, 0, &[1; 60]);
    let mut bad = s.guest.slot(1, 0, &[1; 60]);
    bad.offset = 4095;
    s.guest.send(&[good, bad]);
    let fault = Fault::CrossesPage { offset: 4095, size: 60 };
    assert_eq!(s.queue.poll(&mut s.port, 64), Err(QueueError::Fault(fault)));
    assert_stays_dead(&mut s, fault);
}
