//! The devices, which need an allocator.

use alloc::sync::Arc;

use pvio_blkback::engine::mem::MemEngine;
use pvio_blkback::{
    BlockEngine, DataPath, DiskState, Progress, Queue as Back, QueueParts, QueueRecord, Stats,
};
use pvio_blkfront::{Op, Queue as Front};
use pvio_event_channel::{DomId, EventChannel, EventChannels};
use pvio_grant_table::{Access, GrantMapper};
use pvio_netback::port::memory::loopback;
use pvio_netback::queue::{EventPorts, QueueRefs};
use pvio_netback::{Features as BackFeatures, Queue as NetBack, Stats as NetStats};
use pvio_netfront::{Checksum, Features as FrontFeatures, Queue as NetFront};
use pvio_ring::BackRing;
use pvio_ring::proto::blkif::{Abi, Status};

use crate::machine::Machine;

const FRONT: DomId = DomId(2);
const BACK: DomId = DomId(1);

/// Sends packets through a virtual NIC to a port that echoes them, and compares.
pub fn nic() -> bool {
    send_and_receive().is_some()
}

fn send_and_receive() -> Option<()> {
    let machine = Machine::default();
    let mut front = NetFront::new(&machine, BACK).ok()?;
    let agreed = FrontFeatures {
        sg: true,
        checksum_v4: true,
        checksum_v6: true,
        ..FrontFeatures::default()
    };
    front.set_features(agreed);
    let refs = QueueRefs {
        tx_ring: front.tx_gref(),
        rx_ring: front.rx_gref(),
        events: EventPorts::Shared(front.channel().port()),
    };
    let features = BackFeatures { sg: true, rx_notify: true, ..BackFeatures::LEAST };
    let stats = Arc::new(NetStats::default());
    let mut back = NetBack::attach(machine, FRONT, &refs, features, stats).ok()?;
    let mut port = loopback(4);

    let frame = [0x5a; 1514];
    front.send(&frame, Checksum::default()).ok()?;
    front.publish().ok()?;
    while back.poll(&mut port, 16).ok()?.any() {}
    let mut came = 0;
    let received = front.receive(|packet, _| came += usize::from(packet == frame));
    received.ok()?;
    (came == 1).then_some(())
}

/// Writes to a virtual disk, reads back and compares, on every data path.
pub fn disk() -> bool {
    DataPath::ALL.into_iter().all(|path| write_and_read_back(path).is_some())
}

fn write_and_read_back(data_path: DataPath) -> Option<()> {
    let machine = Machine::default();
    let mut front = Front::new(machine.clone(), BACK, 51712).ok()?;
    let channel = machine.bind_interdomain(FRONT, front.channel().port()).ok()?;
    let ring = machine.map(FRONT, front.ring_grefs(), Access::ReadWrite).ok()?;
    let ring = BackRing::attach(ring, Abi::X86_64.slot_size()).ok()?;
    let record = QueueRecord::private(&ring, Abi::X86_64).ok()?;
    let stats = Arc::new(Stats::default());
    let engine = MemEngine::zeroed(64);
    let parts = QueueParts {
        frontend: FRONT,
        disk: Arc::new(DiskState::new(engine.geometry())),
        grants: machine.clone(),
        data_path,
        ring,
        channel,
        abi: Abi::X86_64,
        max_indirect_segments: 0,
        record,
        stats,
    };
    let mut back = Back::new(parts, engine);

    let data = [0x5a; 1024];
    let slot = front.reserve()?;
    let mut carry_out = |front: &mut Front<Machine>, op| {
        front.start(slot, op).ok()?;
        front.publish().ok()?;
        while back.poll(32).ok()? == Progress::Some {}
        let mut fine = false;
        front.poll(|_, _, status| fine = status == Status::Okay).ok()?;
        fine.then_some(())
    };
    front.fill(slot, 0, &data)?;
    carry_out(&mut front, Op::Write { sector: 7, bytes: data.len() })?;
    front.fill(slot, 0, &[0; 1024])?;
    carry_out(&mut front, Op::Read { sector: 7, bytes: data.len() })?;
    let mut read = [0; 1024];
    front.fetch(slot, 0, &mut read)?;
    (read == data).then_some(())
}
