//! The items of a conformance exchange: every field of item `n` is a function of `n`, the same as
//! in `conformance/peer.c`.

use pvio_ring::proto::blkif::{self, Abi, DataOp, Segment, Segments, Status};
use pvio_ring::proto::netif::{self, RxFlags, TxFlags};
use pvio_ring::shm::SharedMemory;
use pvio_ring::{BackRing, FrontRing, Full, GrantRef, Slot};

/// `mix` in `peer.c`.
pub fn mix(item: u64, field: u64) -> u64 {
    let mut x = item
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(field.wrapping_mul(0xbf58_476d_1ce4_e5b9));
    x ^= x >> 31;
    x = x.wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 29)
}

/// A kind of ring: the layout of its items.
pub trait Kind {
    /// Its name on `peer.c`'s command line.
    const NAME: &'static str;
    const SLOT_SIZE: usize;
    /// Whether a response must be in its own request's slot.
    const IN_ORDER: bool;

    fn push_request<M: SharedMemory>(ring: &mut FrontRing<M>, n: u64) -> Result<(), Full>;
    fn check_request<M: SharedMemory>(slot: &mut Slot<'_, M>, n: u64);
    fn push_response<M: SharedMemory>(ring: &mut BackRing<M>, n: u64) -> Result<(), Full>;
    /// Checks a response and returns the number of its request; no request before `oldest` is
    /// outstanding.
    fn check_response<M: SharedMemory>(slot: &mut Slot<'_, M>, oldest: u64) -> u64;
}

/// Disk requests, native ABI.
pub struct Blk;

impl Blk {
    const ABI: Abi = Abi::X86_64;

    fn request(n: u64) -> blkif::Request {
        let id = mix(n, 1) << 32 | n & 0xffff_ffff;
        let sector = mix(n, 2);
        let ops = [DataOp::Read, DataOp::Write, DataOp::WriteBarrier, DataOp::Flush];
        let Some(&op) = ops.get((mix(n, 0) % 6) as usize) else {
            let odd = mix(n, 3) & 1 == 1;
            if mix(n, 0) % 6 == 4 {
                return blkif::Request::Discard { id, sector, sectors: mix(n, 5), secure: odd };
            }
            let op = if odd { DataOp::Write } else { DataOp::Read };
            let segments = 1 + (mix(n, 5) % 4096) as usize;
            let pages = (0..segments.div_ceil(512) as u64).map(|i| GrantRef(mix(n, 16 + i) as u32));
            let indirect = blkif::Indirect::new(segments, &pages.collect::<Vec<_>>());
            let indirect = indirect.expect("as many pages as they take");
            return blkif::Request::Indirect { op, id, sector, indirect };
        };
        let segments: Vec<_> = (0..1 + mix(n, 3) % 11)
            .map(|i| {
                let (a, b) = ((mix(n, 32 + i) & 7) as u8, (mix(n, 32 + i) >> 3 & 7) as u8);
                let gref = GrantRef(mix(n, 16 + i) as u32);
                Segment { gref, first: a.min(b), last: a.max(b) }
            })
            .collect();
        let segments = Segments::from_slice(&segments).expect("at most 11");
        blkif::Request::Data { op, id, sector, segments }
    }

    fn response(n: u64) -> blkif::Response {
        let (id, op) = match Self::request(n) {
            blkif::Request::Data { op, id, .. } | blkif::Request::Indirect { op, id, .. } => {
                (id, op.code())
            }
            blkif::Request::Discard { id, .. } => (id, blkif::op::DISCARD),
        };
        let status = [Status::Okay, Status::Error, Status::NotSupported][(mix(n, 6) % 3) as usize];
        blkif::Response { id, op, status }
    }
}

impl Kind for Blk {
    const NAME: &'static str = "blk";
    const SLOT_SIZE: usize = Self::ABI.slot_size();
    const IN_ORDER: bool = false;

    fn push_request<M: SharedMemory>(ring: &mut FrontRing<M>, n: u64) -> Result<(), Full> {
        ring.push(Self::request(n).write(Self::ABI, mix(n, 4) as u16, &mut [0; 112]))
    }

    fn check_request<M: SharedMemory>(slot: &mut Slot<'_, M>, n: u64) {
        assert_eq!(blkif::Request::read(slot, Self::ABI), Ok(Ok(Self::request(n))), "request {n}");
    }

    fn push_response<M: SharedMemory>(ring: &mut BackRing<M>, n: u64) -> Result<(), Full> {
        ring.push(Self::response(n).write(Self::ABI, &mut [0; 16]))
    }

    fn check_response<M: SharedMemory>(slot: &mut Slot<'_, M>, _oldest: u64) -> u64 {
        let got = blkif::Response::read(slot).expect("a whole slot");
        let n = got.id & 0xffff_ffff;
        assert_eq!(got, Self::response(n), "response {n}");
        n
    }
}

/// Packets to transmit.
pub struct Tx;

impl Kind for Tx {
    const NAME: &'static str = "tx";
    const SLOT_SIZE: usize = netif::TX_SLOT_SIZE;
    const IN_ORDER: bool = false;

    fn push_request<M: SharedMemory>(ring: &mut FrontRing<M>, n: u64) -> Result<(), Full> {
        ring.push(&tx_request(n).to_bytes())
    }

    fn check_request<M: SharedMemory>(slot: &mut Slot<'_, M>, n: u64) {
        assert_eq!(netif::TxRequest::read(slot), Ok(tx_request(n)), "request {n}");
    }

    fn push_response<M: SharedMemory>(ring: &mut BackRing<M>, n: u64) -> Result<(), Full> {
        ring.push(&tx_response(n).to_bytes())
    }

    fn check_response<M: SharedMemory>(slot: &mut Slot<'_, M>, oldest: u64) -> u64 {
        let got = netif::TxResponse::read(slot).expect("a whole slot");
        let n = oldest + u64::from(got.id.wrapping_sub(oldest as u16));
        assert_eq!(got, tx_response(n), "response {n}");
        n
    }
}

fn tx_request(n: u64) -> netif::TxRequest {
    netif::TxRequest {
        gref: GrantRef(mix(n, 0) as u32),
        offset: mix(n, 1) as u16,
        flags: TxFlags::from_bits_retain(mix(n, 2) as u16 & 15),
        id: n as u16,
        size: mix(n, 3) as u16,
    }
}

fn tx_response(n: u64) -> netif::TxResponse {
    netif::TxResponse { id: n as u16, status: (mix(n, 4) % 4) as i16 - 2 }
}

/// Pages to receive into.
pub struct Rx;

impl Kind for Rx {
    const NAME: &'static str = "rx";
    const SLOT_SIZE: usize = netif::RX_SLOT_SIZE;
    const IN_ORDER: bool = true;

    fn push_request<M: SharedMemory>(ring: &mut FrontRing<M>, n: u64) -> Result<(), Full> {
        ring.push(&rx_request(n).to_bytes())
    }

    fn check_request<M: SharedMemory>(slot: &mut Slot<'_, M>, n: u64) {
        assert_eq!(netif::RxRequest::read(slot), Ok(rx_request(n)), "request {n}");
    }

    fn push_response<M: SharedMemory>(ring: &mut BackRing<M>, n: u64) -> Result<(), Full> {
        ring.push(&rx_response(n).to_bytes())
    }

    fn check_response<M: SharedMemory>(slot: &mut Slot<'_, M>, oldest: u64) -> u64 {
        assert_eq!(netif::RxResponse::read(slot), Ok(rx_response(oldest)), "response {oldest}");
        oldest
    }
}

fn rx_request(n: u64) -> netif::RxRequest {
    netif::RxRequest { id: n as u16, gref: GrantRef(mix(n, 0) as u32) }
}

fn rx_response(n: u64) -> netif::RxResponse {
    netif::RxResponse {
        id: n as u16,
        offset: mix(n, 1) as u16,
        flags: RxFlags::from_bits_retain(mix(n, 2) as u16 & 31),
        status: mix(n, 3) as i16,
    }
}
