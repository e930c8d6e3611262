//! Sizes, offsets and constants from a C compiler with Xen's public headers, in both ABIs, compared
//! with the bytes that we emit (`proto.rs` shows that we parse what we emit). Needs a C compiler
//! and Debian's `libxen-dev`; prints SKIPPED without them.
#![forbid(unsafe_code)]

#[path = "support/c_compiler.rs"]
mod c_compiler;

use core::sync::atomic::Ordering;
use pvio_grant_table::v1::{self, Flags, GrantTable};
use pvio_grant_table::{Access, DomId};
use pvio_ring::byte_ring::{
    CONSOLE_IN, CONSOLE_OUT, XENSTORE_CONNECTION, XENSTORE_ERROR, XENSTORE_REQ, XENSTORE_RSP,
    XENSTORE_SERVER_FEATURES,
};
use pvio_ring::proto::{blkif, netif};
use pvio_ring::shm::{HeapMemory, PAGE_SIZE, Region};
use pvio_ring::{FrontRing, GrantRef, RingLayout};
use std::collections::HashMap;
use std::process::Command;

/// The output of one build of `layouts.c`.
struct Headers(HashMap<String, i64>);

impl Headers {
    /// Returns `None` (and prints SKIPPED) if the headers cannot be used.
    fn of(test: &str, abi: blkif::Abi) -> Option<Self> {
        if !c_compiler::can_compile(test) {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let flags: &[&str] = if abi == blkif::Abi::X86_32 { &["-DX86_32"] } else { &[] };
        let program = c_compiler::compile("layouts.c", flags, dir.path());
        let output = Command::new(program).output().unwrap();
        assert!(output.status.success());
        let lines = String::from_utf8(output.stdout).unwrap();
        let entry = |line: &str| {
            let (name, value) = line.split_once(' ').expect("name value");
            (name.to_owned(), value.parse().expect("a number"))
        };
        Some(Self(lines.lines().map(entry).collect()))
    }

    fn number(&self, name: &str) -> i64 {
        *self.0.get(name).unwrap_or_else(|| panic!("layouts.c does not print {name}"))
    }

    fn at(&self, name: &str) -> usize {
        usize::try_from(self.number(name)).expect("an offset")
    }

    /// Returns the little-endian field `name`, `len` bytes long, of an emitted struct.
    fn field(&self, bytes: &[u8], name: &str, len: usize) -> u64 {
        let at = self.at(name);
        let mut value = [0; 8];
        value[..len].copy_from_slice(&bytes[at..at + len]);
        u64::from_le_bytes(value)
    }

    fn check(&self, expected: &[(&str, i64)]) {
        for (name, ours) in expected {
            assert_eq!(self.number(name), *ours, "{name}");
        }
    }
}

const ABIS: [blkif::Abi; 2] = [blkif::Abi::X86_64, blkif::Abi::X86_32];

#[test]
fn blkif_layouts_match_xen_header() {
    for abi in ABIS {
        let Some(c) = Headers::of("blkif layouts", abi) else { return };
        c.check(&[
            ("blk_slot", abi.slot_size() as i64),
            ("blk_request", abi.slot_size() as i64),
            ("blk_response", abi.response_size() as i64),
            ("BLKIF_OP_READ", blkif::op::READ.into()),
            ("BLKIF_OP_WRITE", blkif::op::WRITE.into()),
            ("BLKIF_OP_WRITE_BARRIER", blkif::op::WRITE_BARRIER.into()),
            ("BLKIF_OP_FLUSH_DISKCACHE", blkif::op::FLUSH_DISKCACHE.into()),
            ("BLKIF_OP_DISCARD", blkif::op::DISCARD.into()),
            ("BLKIF_OP_INDIRECT", blkif::op::INDIRECT.into()),
            ("BLKIF_DISCARD_SECURE", blkif::DISCARD_SECURE.into()),
            ("BLKIF_MAX_SEGMENTS_PER_REQUEST", blkif::MAX_SEGMENTS as i64),
            ("BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST", blkif::MAX_INDIRECT_PAGES as i64),
            ("BLKIF_RSP_OKAY", blkif::Status::Okay as i64),
            ("BLKIF_RSP_ERROR", blkif::Status::Error as i64),
            ("BLKIF_RSP_EOPNOTSUPP", blkif::Status::NotSupported as i64),
            ("VDISK_CDROM", blkif::info::CDROM.into()),
            ("VDISK_REMOVABLE", blkif::info::REMOVABLE.into()),
            ("VDISK_READONLY", blkif::info::READONLY.into()),
        ]);

        let (id, sector) = (0x1122_3344_5566_7788, 0x99aa_bbcc_ddee_ff01);
        let all: Vec<_> = (0..11_u8)
            .map(|i| blkif::Segment {
                gref: GrantRef(0xa0b0_c000 + u32::from(i)),
                first: i % 4,
                last: 4 + i % 3,
            })
            .collect();
        let segments = blkif::Segments::from_slice(&all).unwrap();
        let op = blkif::DataOp::Write;
        let mut raw = [0xee; 112];
        let request = blkif::Request::Data { op, id, sector, segments };
        let bytes = request.write(abi, 0xca01, &mut raw);
        assert_eq!(bytes.len(), c.at("blk_request"));
        assert_eq!(c.field(bytes, "blk_request.operation", 1), 1);
        assert_eq!(c.field(bytes, "blk_request.nr_segments", 1), 11);
        assert_eq!(c.field(bytes, "blk_request.handle", 2), 0xca01);
        assert_eq!(c.field(bytes, "blk_request.id", 8), id);
        assert_eq!(c.field(bytes, "blk_request.sector_number", 8), sector);
        let array = &bytes[c.at("blk_request.seg")..];
        for (raw, segment) in array.chunks_exact(c.at("blk_segment")).zip(&all) {
            assert_eq!(c.field(raw, "blk_segment.gref", 4), segment.gref.0.into());
            assert_eq!(c.field(raw, "blk_segment.first_sect", 1), segment.first.into());
            assert_eq!(c.field(raw, "blk_segment.last_sect", 1), segment.last.into());
        }

        let discard =
            blkif::Request::Discard { id, sector, sectors: 0x0203_0405_0607, secure: true };
        let bytes = discard.write(abi, 0xca01, &mut raw);
        assert_eq!(bytes.len(), c.at("blk_discard"));
        assert_eq!(c.field(bytes, "blk_discard.operation", 1), 5);
        assert_eq!(c.field(bytes, "blk_discard.flag", 1), 1);
        assert_eq!(c.field(bytes, "blk_discard.handle", 2), 0xca01);
        assert_eq!(c.field(bytes, "blk_discard.id", 8), id);
        assert_eq!(c.field(bytes, "blk_discard.sector_number", 8), sector);
        assert_eq!(c.field(bytes, "blk_discard.nr_sectors", 8), 0x0203_0405_0607);

        let pages: Vec<_> = (0..8).map(|i| GrantRef(0xd0e0_f000 + i)).collect();
        let indirect = blkif::Indirect::new(4095, &pages).unwrap();
        let big = blkif::Request::Indirect { op, id, sector, indirect };
        let mut raw = [0xee; 112];
        let bytes = big.write(abi, 0xca01, &mut raw);
        // The header pads it to 64 bytes for compilers that define __i386__; this one does not.
        let padding = if abi == blkif::Abi::X86_32 { 8 } else { 0 };
        assert_eq!((bytes.len(), c.at("blk_indirect") + padding), (64, 64));
        assert_eq!(c.field(bytes, "blk_indirect.operation", 1), 6);
        assert_eq!(c.field(bytes, "blk_indirect.indirect_op", 1), 1);
        assert_eq!(c.field(bytes, "blk_indirect.nr_segments", 2), 4095);
        assert_eq!(c.field(bytes, "blk_indirect.id", 8), id);
        assert_eq!(c.field(bytes, "blk_indirect.sector_number", 8), sector);
        assert_eq!(c.field(bytes, "blk_indirect.handle", 2), 0xca01);
        let array = &bytes[c.at("blk_indirect.indirect_grefs")..];
        for (raw, page) in array.chunks_exact(4).zip(&pages) {
            assert_eq!(raw, page.0.to_le_bytes());
        }
        let inside = all[3].write();
        assert_eq!(inside.len(), c.at("blk_segment"));
        assert_eq!(c.field(&inside, "blk_segment.gref", 4), all[3].gref.0.into());
        assert_eq!(c.field(&inside, "blk_segment.first_sect", 1), all[3].first.into());
        assert_eq!(c.field(&inside, "blk_segment.last_sect", 1), all[3].last.into());

        let mut raw = [0xee; 16];
        let response = blkif::Response { id, op: 3, status: blkif::Status::NotSupported };
        let bytes = response.write(abi, &mut raw);
        assert_eq!(c.field(bytes, "blk_response.id", 8), id);
        assert_eq!(c.field(bytes, "blk_response.operation", 1), 3);
        assert_eq!(c.field(bytes, "blk_response.status", 2), 0xfffe);
    }
}

#[test]
fn netif_layouts_match_xen_header() {
    let Some(c) = Headers::of("netif layouts", blkif::Abi::X86_64) else { return };
    use netif::{RxFlags, TxFlags, rsp};
    c.check(&[
        ("tx_slot", netif::TX_SLOT_SIZE as i64),
        ("tx_request", netif::TX_SLOT_SIZE as i64),
        ("tx_response", 4),
        ("rx_slot", netif::RX_SLOT_SIZE as i64),
        ("rx_request", netif::RX_SLOT_SIZE as i64),
        ("rx_response", netif::RX_SLOT_SIZE as i64),
        ("extra", 8),
        ("NETTXF_csum_blank", TxFlags::CSUM_BLANK.bits().into()),
        ("NETTXF_data_validated", TxFlags::DATA_VALIDATED.bits().into()),
        ("NETTXF_more_data", TxFlags::MORE_DATA.bits().into()),
        ("NETTXF_extra_info", TxFlags::EXTRA_INFO.bits().into()),
        ("NETRXF_data_validated", RxFlags::DATA_VALIDATED.bits().into()),
        ("NETRXF_csum_blank", RxFlags::CSUM_BLANK.bits().into()),
        ("NETRXF_more_data", RxFlags::MORE_DATA.bits().into()),
        ("NETRXF_extra_info", RxFlags::EXTRA_INFO.bits().into()),
        ("NETRXF_gso_prefix", RxFlags::GSO_PREFIX.bits().into()),
        ("NETIF_RSP_DROPPED", rsp::DROPPED.into()),
        ("NETIF_RSP_ERROR", rsp::ERROR.into()),
        ("NETIF_RSP_OKAY", rsp::OKAY.into()),
        ("NETIF_RSP_NULL", rsp::NULL.into()),
        ("XEN_NETIF_NR_SLOTS_MIN", netif::SLOTS_MIN as i64),
        ("XEN_NETIF_MAX_TX_SIZE", netif::MAX_PACKET as i64),
    ]);
    let gref = GrantRef(0x0102_0304);
    let tx =
        netif::TxRequest { gref, offset: 0x506, flags: TxFlags::all(), id: 0x708, size: 0x90a };
    let bytes = tx.to_bytes();
    assert_eq!(c.field(&bytes, "tx_request.gref", 4), 0x0102_0304);
    assert_eq!(c.field(&bytes, "tx_request.offset", 2), 0x506);
    assert_eq!(c.field(&bytes, "tx_request.flags", 2), 15);
    assert_eq!(c.field(&bytes, "tx_request.id", 2), 0x708);
    assert_eq!(c.field(&bytes, "tx_request.size", 2), 0x90a);
    let bytes = netif::TxResponse { id: 0x102, status: -2 }.to_bytes();
    assert_eq!(c.field(&bytes, "tx_response.id", 2), 0x102);
    assert_eq!(c.field(&bytes, "tx_response.status", 2), 0xfffe);
    let bytes = netif::RxRequest { id: 0x506, gref }.to_bytes();
    assert_eq!(c.field(&bytes, "rx_request.id", 2), 0x506);
    assert_eq!(c.field(&bytes, "rx_request.gref", 4), 0x0102_0304);
    let rx = netif::RxResponse { id: 0x102, offset: 0x304, flags: RxFlags::all(), status: 0x506 };
    let bytes = rx.to_bytes();
    assert_eq!(c.field(&bytes, "rx_response.id", 2), 0x102);
    assert_eq!(c.field(&bytes, "rx_response.offset", 2), 0x304);
    assert_eq!(c.field(&bytes, "rx_response.flags", 2), 31);
    assert_eq!(c.field(&bytes, "rx_response.status", 2), 0x506);
}

#[test]
fn extra_segment_layouts_match_xen_header() {
    let Some(c) = Headers::of("extra segment layouts", blkif::Abi::X86_64) else { return };
    use netif::{Extra, ExtraKind, GsoKind};
    let kind_of = |bytes: &[u8]| c.field(bytes, "extra.type", 1) as i64;
    for (kind, wire) in
        [(GsoKind::TcpV4, "XEN_NETIF_GSO_TYPE_TCPV4"), (GsoKind::TcpV6, "XEN_NETIF_GSO_TYPE_TCPV6")]
    {
        let extra = Extra { kind: ExtraKind::Gso { size: 0x5b4, kind }, more: true };
        let bytes = extra.to_bytes();
        assert_eq!(kind_of(&bytes), c.number("XEN_NETIF_EXTRA_TYPE_GSO"));
        let flags = c.field(&bytes, "extra.flags", 1) as i64;
        assert_eq!(flags, c.number("XEN_NETIF_EXTRA_FLAG_MORE"));
        assert_eq!(c.field(&bytes, "extra.u.gso.size", 2), 0x5b4);
        assert_eq!(c.field(&bytes, "extra.u.gso.type", 1) as i64, c.number(wire));
    }
    let mac = [2, 3, 4, 5, 6, 7];
    for (kind, wire) in [
        (ExtraKind::McastAdd(mac), "XEN_NETIF_EXTRA_TYPE_MCAST_ADD"),
        (ExtraKind::McastDel(mac), "XEN_NETIF_EXTRA_TYPE_MCAST_DEL"),
    ] {
        let bytes = Extra { kind, more: false }.to_bytes();
        assert_eq!(kind_of(&bytes), c.number(wire));
        assert_eq!(c.field(&bytes, "extra.flags", 1), 0);
        let at = c.at("extra.u.mcast.addr");
        assert_eq!(bytes[at..at + 6], mac);
    }
    let kind = ExtraKind::Hash { kind: 3, algorithm: 1, value: 0x0405_0607 };
    let bytes = Extra { kind, more: false }.to_bytes();
    assert_eq!(kind_of(&bytes), c.number("XEN_NETIF_EXTRA_TYPE_HASH"));
    assert_eq!(c.field(&bytes, "extra.u.hash.type", 1), 3);
    assert_eq!(c.field(&bytes, "extra.u.hash.algorithm", 1), 1);
    assert_eq!(c.field(&bytes, "extra.u.hash.value", 4), 0x0405_0607);
}

#[test]
fn control_message_layouts_match_xen_header() {
    let Some(c) = Headers::of("control ring layouts", blkif::Abi::X86_64) else { return };
    use netif::{CtrlRequest, CtrlResponse, CtrlStatus, GrefEntry, HashKind, HashTypes, ctrl_type};
    c.check(&[
        ("ctrl_slot", netif::CTRL_SLOT_SIZE as i64),
        ("ctrl_request", netif::CTRL_SLOT_SIZE as i64),
        ("ctrl_response", netif::CTRL_RESPONSE_SIZE as i64),
        ("gref", netif::GREF_ENTRY_SIZE as i64),
        ("XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS", ctrl_type::GET_HASH_FLAGS.into()),
        ("XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS", ctrl_type::SET_HASH_FLAGS.into()),
        ("XEN_NETIF_CTRL_TYPE_SET_HASH_KEY", ctrl_type::SET_HASH_KEY.into()),
        ("XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE", ctrl_type::GET_HASH_MAPPING_SIZE.into()),
        ("XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE", ctrl_type::SET_HASH_MAPPING_SIZE.into()),
        ("XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING", ctrl_type::SET_HASH_MAPPING.into()),
        ("XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM", ctrl_type::SET_HASH_ALGORITHM.into()),
        ("XEN_NETIF_CTRL_TYPE_GET_GREF_MAPPING_SIZE", ctrl_type::GET_GREF_MAPPING_SIZE.into()),
        ("XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING", ctrl_type::ADD_GREF_MAPPING.into()),
        ("XEN_NETIF_CTRL_TYPE_DEL_GREF_MAPPING", ctrl_type::DEL_GREF_MAPPING.into()),
        ("XEN_NETIF_CTRL_STATUS_SUCCESS", CtrlStatus::Success as i64),
        ("XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED", CtrlStatus::NotSupported as i64),
        ("XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER", CtrlStatus::InvalidParameter as i64),
        ("XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW", CtrlStatus::BufferOverflow as i64),
        ("XEN_NETIF_CTRL_HASH_TYPE_IPV4", HashTypes::IPV4.bits().into()),
        ("XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP", HashTypes::IPV4_TCP.bits().into()),
        ("XEN_NETIF_CTRL_HASH_TYPE_IPV6", HashTypes::IPV6.bits().into()),
        ("XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP", HashTypes::IPV6_TCP.bits().into()),
        ("_XEN_NETIF_CTRL_HASH_TYPE_IPV4", HashKind::V4 as i64),
        ("_XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP", HashKind::V4Tcp as i64),
        ("_XEN_NETIF_CTRL_HASH_TYPE_IPV6", HashKind::V6 as i64),
        ("_XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP", HashKind::V6Tcp as i64),
        ("XEN_NETIF_CTRL_HASH_ALGORITHM_NONE", netif::HASH_NONE.into()),
        ("XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ", netif::HASH_TOEPLITZ.into()),
        ("XEN_NETIF_CTRLF_GREF_readonly", 1),
    ]);
    let data = [0x0102_0304, 0x0506_0708, 0x090a_0b0c];
    let bytes = CtrlRequest { id: 0x1112, kind: 0x1314, data }.to_bytes();
    assert_eq!(c.field(&bytes, "ctrl_request.id", 2), 0x1112);
    assert_eq!(c.field(&bytes, "ctrl_request.type", 2), 0x1314);
    let at = c.at("ctrl_request.data");
    for (word, raw) in data.iter().zip(bytes[at..].chunks_exact(4)) {
        assert_eq!(raw, word.to_le_bytes());
    }
    let response = CtrlResponse { id: 0x1112, kind: 0x1314, status: 2, data: 0x0102_0304 };
    let bytes = response.to_bytes();
    assert_eq!(c.field(&bytes, "ctrl_response.id", 2), 0x1112);
    assert_eq!(c.field(&bytes, "ctrl_response.type", 2), 0x1314);
    assert_eq!(c.field(&bytes, "ctrl_response.status", 4), 2);
    assert_eq!(c.field(&bytes, "ctrl_response.data", 4), 0x0102_0304);
    let gref = GrantRef(0x0102_0304);
    let bytes = GrefEntry { gref, read_only: true, status: 0x506 }.to_bytes();
    assert_eq!(c.field(&bytes, "gref.ref", 4), 0x0102_0304);
    assert_eq!(c.field(&bytes, "gref.flags", 2), 1);
    assert_eq!(c.field(&bytes, "gref.status", 2), 0x506);
}

#[test]
fn toeplitz_hash_matches_xen_header() {
    let Some(c) = Headers::of("the Toeplitz hash", blkif::Abi::X86_64) else { return };
    let key = core::array::from_fn(|i| (i * 37 + 11) as u8);
    let data: [u8; 36] = core::array::from_fn(|i| (i * 91 + 5) as u8);
    for len in (0..=36).step_by(4) {
        let hash = netif::toeplitz(&key, &data[..len]);
        assert_eq!(c.number(&format!("toeplitz_{len}")), hash.into(), "{len} bytes");
    }
}

#[test]
fn ring_layouts_match_xen_header() {
    for abi in ABIS {
        let Some(c) = Headers::of("ring layouts", abi) else { return };
        for pages in 1..=32 {
            for (name, slot) in [
                ("blkif", abi.slot_size()),
                ("netif_tx", netif::TX_SLOT_SIZE),
                ("netif_rx", netif::RX_SLOT_SIZE),
                ("xen_netif_ctrl", netif::CTRL_SLOT_SIZE),
            ] {
                let ours = RingLayout::new(pages * PAGE_SIZE, slot).expect(name).slots();
                assert_eq!(
                    c.number(&format!("{name}_slots_{pages}")),
                    ours.into(),
                    "{name} {pages}"
                );
            }
        }
        let start = 0xffff_fff0;
        let mem = HeapMemory::pages(1);
        let word = |name: &str| mem.load_u32(c.at(name), Ordering::Relaxed).unwrap();
        let mut front = FrontRing::init_at(mem.clone(), abi.slot_size(), start).unwrap();
        assert_eq!(word("blk_sring.req_event"), start + 1);
        assert_eq!(word("blk_sring.rsp_event"), start + 1);
        assert_eq!(word("blk_sring.req_prod"), start);
        assert_eq!(word("blk_sring.rsp_prod"), start);
        for i in 0..20_u32 {
            front.push(&i.to_le_bytes()).unwrap();
        }
        assert!(front.publish());
        assert_eq!(word("blk_sring.req_prod"), 4);
        // The slot of index 0, after the wrap.
        let first = mem.load_u32(c.at("blk_sring.ring"), Ordering::Relaxed).unwrap();
        assert_eq!(first, 16);
        let second = c.at("blk_sring.ring") + c.at("blk_slot");
        assert_eq!(mem.load_u32(second, Ordering::Relaxed).unwrap(), 17);
    }
    let Some(c) = Headers::of("ring layouts", blkif::Abi::X86_64) else { return };
    assert_eq!(c.at("tx_sring.ring"), 64);
    assert_eq!(c.at("rx_sring.ring"), 64);
}

#[test]
fn grant_entry_layout_matches_xen_header() {
    let Some(c) = Headers::of("grant table layout", blkif::Abi::X86_64) else { return };
    c.check(&[
        ("grant", v1::ENTRY_SIZE as i64),
        ("GTF_permit_access", Flags::PERMIT_ACCESS.bits().into()),
        ("GTF_type_mask", Flags::TYPE.bits().into()),
        ("GTF_readonly", Flags::READONLY.bits().into()),
        ("GTF_reading", Flags::READING.bits().into()),
        ("GTF_writing", Flags::WRITING.bits().into()),
        ("GNTTAB_NR_RESERVED_ENTRIES", GrantRef::FIRST_FREE.0.into()),
        ("DOMID_FIRST_RESERVED", DomId::FIRST_RESERVED.into()),
        ("DOMID_SELF", DomId::SELF.0.into()),
    ]);
    let mem = HeapMemory::pages(1);
    let table = GrantTable::new(mem.clone());
    let gref = GrantRef(9);
    table.grant(gref, DomId(0x1234), 0xcafe_f00d, Access::ReadOnly).unwrap();
    table.pin(gref, DomId(0x1234), Access::ReadOnly).unwrap();
    let mut entry = [0; 8];
    mem.read_bytes(9 * c.at("grant"), &mut entry).unwrap();
    let flags = Flags::PERMIT_ACCESS | Flags::READONLY | Flags::READING;
    assert_eq!(c.field(&entry, "grant.flags", 2), flags.bits().into());
    assert_eq!(c.field(&entry, "grant.domid", 2), 0x1234);
    assert_eq!(c.field(&entry, "grant.frame", 4), 0xcafe_f00d);
}

#[test]
fn byte_stream_layouts_match_xen_headers() {
    let Some(c) = Headers::of("byte stream layouts", blkif::Abi::X86_64) else { return };
    for (stream, name, way) in [
        (CONSOLE_IN, "console", "in"),
        (CONSOLE_OUT, "console", "out"),
        (XENSTORE_REQ, "xenstore", "req"),
        (XENSTORE_RSP, "xenstore", "rsp"),
    ] {
        assert_eq!(c.at(&format!("{name}.{way}")), stream.buffer);
        assert_eq!(c.at(&format!("{name}.{way}_cons")), stream.cons);
        assert_eq!(c.at(&format!("{name}.{way}_prod")), stream.prod);
    }
    for (offset, name) in [
        (XENSTORE_SERVER_FEATURES, "server_features"),
        (XENSTORE_CONNECTION, "connection"),
        (XENSTORE_ERROR, "error"),
    ] {
        assert_eq!(c.at(&format!("xenstore.{name}")), offset);
    }
    assert_eq!(c.at("console.out") - c.at("console.in"), CONSOLE_IN.size as usize);
    assert_eq!(c.at("console.in_cons") - c.at("console.out"), CONSOLE_OUT.size as usize);
    assert_eq!(c.number("XENSTORE_RING_SIZE"), XENSTORE_REQ.size.into());
    assert_eq!(c.number("XENSTORE_RING_SIZE"), XENSTORE_RSP.size.into());
}
