//! Parts that tests and examples share (feature `test-utils`): a queue without a handshake, and the
//! disk in memory ([`engine::mem`](crate::engine::mem)). No part of the product uses them.

use crate::path::DataPath;
use crate::queue::{QueueParts, QueueRecord};
use crate::{DiskState, Geometry, Stats};
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::error::Error;
use pvio_event_channel::{BackendPlatform, DomId, Port};
use pvio_grant_table::{Access, GrantRef};
use pvio_ring::BackRing;
use pvio_ring::proto::blkif::Abi;

/// Connects to a frontend whose ring references and port are known, as after a handshake. The parts are
/// those of a disk with `geometry`, with the x86_64 layout, mapped pages and no indirect requests.
///
/// # Errors
/// The ring cannot be mapped or is invalid, or the port cannot be bound.
pub fn connect<P: BackendPlatform>(
    platform: P,
    frontend: DomId,
    ring: &[GrantRef],
    port: Port,
    geometry: Geometry,
) -> Result<QueueParts<P, P::Channel>, Box<dyn Error>> {
    let abi = Abi::X86_64;
    let ring = BackRing::attach(platform.map(frontend, ring, Access::ReadWrite)?, abi.slot_size())?;
    Ok(QueueParts {
        frontend,
        disk: Arc::new(DiskState::new(geometry)),
        channel: platform.bind_interdomain(frontend, port)?,
        record: QueueRecord::private(&ring, abi)?,
        grants: platform,
        data_path: DataPath::Map,
        ring,
        abi,
        max_indirect_segments: 0,
        stats: Arc::new(Stats::default()),
    })
}
