//! Test setup: two domains, with a frontend and a backend of a queue.

use pvio_blkback::engine::mem::MemEngine;
use pvio_blkback::{
    BlockEngine, Buf, DataPath, DiskState, Geometry, Progress, Queue, QueueParts, QueueRecord,
    Stats,
};
use pvio_blkfront::{Queue as Front, Shape};
use pvio_event_channel::{DomId, EventChannel, EventChannels};
use pvio_grant_table::{Access, GrantMapper, GrantRef, Granter};
use pvio_ring::proto::blkif::{Abi, RefusalReason, Response};
use pvio_ring::{BackRing, FrontRing};
use pvio_sim::{LocalDomain, LocalMachine};
use std::sync::Arc;

pub const FRONT: DomId = DomId(2);
pub const BACK: DomId = DomId(1);
pub const SECTORS: usize = 4096;
/// Advertised maximum of segments of an indirect request.
pub const INDIRECT: u32 = 600;
pub const PATHS: [DataPath; 4] = DataPath::ALL;

pub type Channel = <LocalDomain as EventChannels>::Channel;
pub type Pages = <LocalDomain as Granter>::Pages;
pub type PageBuf = Buf<<LocalDomain as GrantMapper>::Mapping>;
pub type Mem = MemEngine<PageBuf>;
pub type Backend<E = Mem> = Queue<LocalDomain, Channel, E>;

pub fn serve<E: BlockEngine<PageBuf>>(
    back: LocalDomain,
    ring: &[GrantRef],
    channel: Channel,
    abi: Abi,
    data_path: DataPath,
    max_indirect_segments: u32,
    engine: E,
) -> Backend<E> {
    let disk = Arc::new(DiskState::new(engine.geometry()));
    serve_as(disk, back, ring, channel, abi, data_path, max_indirect_segments, engine)
}

#[expect(clippy::too_many_arguments, reason = "all that a queue is made of")]
fn serve_as<E: BlockEngine<PageBuf>>(
    disk: Arc<DiskState>,
    back: LocalDomain,
    ring: &[GrantRef],
    channel: Channel,
    abi: Abi,
    data_path: DataPath,
    max_indirect_segments: u32,
    engine: E,
) -> Backend<E> {
    let ring = back.map(FRONT, ring, Access::ReadWrite).unwrap();
    let ring = BackRing::attach(ring, abi.slot_size()).unwrap();
    let record = QueueRecord::private(&ring, abi).unwrap();
    let stats = Arc::new(Stats::default());
    let parts = QueueParts {
        frontend: FRONT,
        disk,
        grants: back,
        data_path,
        ring,
        channel,
        abi,
        max_indirect_segments,
        record,
        stats,
    };
    Queue::new(parts, engine)
}

pub fn run<E: BlockEngine<PageBuf>>(back: &mut Backend<E>) {
    while back.poll(32).unwrap() == Progress::Some {}
}

pub fn pair<E: BlockEngine<PageBuf>>(
    path: DataPath,
    engine: E,
) -> (LocalMachine, Front<LocalDomain>, Backend<E>) {
    large(path, Shape::LEAST, engine)
}

pub fn large<E: BlockEngine<PageBuf>>(
    path: DataPath,
    shape: Shape,
    engine: E,
) -> (LocalMachine, Front<LocalDomain>, Backend<E>) {
    let machine = LocalMachine::new();
    let (guest, driver) = (machine.domain(FRONT), machine.domain(BACK));
    let front = Front::with_shape(guest, BACK, 51712, shape).unwrap();
    let channel = driver.bind_interdomain(FRONT, front.channel().port()).unwrap();
    let back = serve(driver, front.ring_grefs(), channel, Abi::X86_64, path, INDIRECT, engine);
    (machine, front, back)
}

/// A frontend that writes arbitrary bytes.
pub struct Hostile<E = Mem> {
    pub guest: LocalDomain,
    pub driver: LocalDomain,
    pub ring: FrontRing<Pages>,
    pub back: Backend<E>,
    pub disk: Arc<DiskState>,
    pub data: GrantRef,
    pub readonly: GrantRef,
    _pages: [Pages; 2],
}

impl<E: BlockEngine<PageBuf>> Hostile<E> {
    pub fn new(path: DataPath, abi: Abi, engine: E) -> Self {
        let geometry = engine.geometry();
        Self::with(path, abi, INDIRECT, geometry, engine)
    }

    /// Creates a frontend and a disk with this geometry.
    pub fn of(path: DataPath, abi: Abi, geometry: Geometry, engine: E) -> Self {
        Self::with(path, abi, INDIRECT, geometry, engine)
    }

    pub fn without_indirect(path: DataPath, engine: E) -> Self {
        let geometry = engine.geometry();
        Self::with(path, Abi::X86_64, 0, geometry, engine)
    }

    fn with(path: DataPath, abi: Abi, indirect: u32, geometry: Geometry, engine: E) -> Self {
        let machine = LocalMachine::new();
        let (guest, driver) = (machine.domain(FRONT), machine.domain(BACK));
        let granted = |access| {
            let page = guest.alloc_pages(1).unwrap();
            (guest.grant(BACK, &page, 0, access).unwrap(), page)
        };
        let (ring_gref, ring_page) = granted(Access::ReadWrite);
        let (data, data_page) = granted(Access::ReadWrite);
        let (readonly, readonly_page) = granted(Access::ReadOnly);
        let ring = FrontRing::init(ring_page, abi.slot_size()).unwrap();
        let end = guest.alloc_unbound(BACK).unwrap();
        let channel = driver.bind_interdomain(FRONT, end.port()).unwrap();
        let disk = Arc::new(DiskState::new(geometry));
        let back = serve_as(
            Arc::clone(&disk),
            driver.clone(),
            &[ring_gref],
            channel,
            abi,
            path,
            indirect,
            engine,
        );
        let pages = [data_page, readonly_page];
        Self { guest, driver, ring, back, disk, data, readonly, _pages: pages }
    }

    pub fn ask(&mut self, request: &[u8]) -> Response {
        self.put(request);
        run(&mut self.back);
        self.answer().expect("an answer")
    }

    pub fn put(&mut self, request: &[u8]) {
        self.ring.push(request).unwrap();
        let _ = self.ring.publish();
    }

    pub fn answer(&mut self) -> Option<Response> {
        self.ring.pop().unwrap().map(|mut slot| Response::read(&mut slot).unwrap())
    }

    /// Returns a new page, granted to the backend.
    pub fn page(&self) -> (GrantRef, Pages) {
        let page = self.guest.alloc_pages(1).unwrap();
        (self.guest.grant(BACK, &page, 0, Access::ReadWrite).unwrap(), page)
    }

    pub fn refused(&self, reason: RefusalReason) -> u64 {
        self.back.stats().refused().find(|(r, _)| *r == reason).unwrap().1
    }
}

/// A request in the native layout: op, count, id 7, sector, segments.
pub fn raw(op: u8, count: u8, sector: u64, segments: &[(u32, u8, u8)]) -> Vec<u8> {
    let mut bytes = vec![op, count, 0, 0, 0, 0, 0, 0];
    bytes.extend(7_u64.to_le_bytes());
    bytes.extend(sector.to_le_bytes());
    for (gref, first, last) in segments {
        bytes.extend(gref.to_le_bytes());
        bytes.extend([*first, *last, 0, 0]);
    }
    bytes.resize(112, 0xee);
    bytes
}
