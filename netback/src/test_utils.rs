//! Parts that tests and examples share (feature `test-utils`): a queue without a handshake, and the
//! ports in memory ([`port::memory`](crate::port::memory)). No part of the product uses them.

use crate::fault::AttachError;
use crate::port::PacketBuf;
use crate::queue::{EventPorts, QueueRefs};
use crate::{Features, Queue};
use pvio_event_channel::{BackendPlatform, DomId, Port};
use pvio_grant_table::GrantRef;

/// Connects to a frontend whose ring references (transmit, receive) and port are known, as after a
/// handshake without features.
///
/// # Errors
/// An [`AttachError`]; nothing stays mapped or bound.
pub fn connect<P: BackendPlatform, B: PacketBuf>(
    platform: P,
    frontend: DomId,
    [tx_ring, rx_ring]: [GrantRef; 2],
    port: Port,
) -> Result<Queue<P, B>, AttachError> {
    let refs = QueueRefs { tx_ring, rx_ring, events: EventPorts::Shared(port) };
    Queue::attach(platform, frontend, &refs, Features::LEAST, Default::default())
}
