//! Attachment of a queue to the rings and event channels of a frontend.

use super::access::PageAccess;
use super::refs::{EventPorts, QueueRefs};
use super::ring::{Direction, Ring};
use super::{Counted, Features, Groups, Queue, SessionRefs, VifRecord, rx, tx};
use crate::fault::AttachError;
use crate::port::PacketBuf;
use crate::stats::Stats;
use alloc::sync::Arc;
use core::time::Duration;
use pvio_event_channel::BackendPlatform;
use pvio_grant_table::{Access, DomId};
use pvio_ring::shm::{Part, SharedMemory};

impl<P: BackendPlatform, B: PacketBuf> Queue<P, B> {
    /// Maps the rings of a frontend in domain `peer` and binds its event channels. Requests that
    /// have no response are served. The in-flight record is in private memory and is lost when the
    /// process ends.
    ///
    /// # Errors
    /// An [`AttachError`]; nothing stays mapped or bound.
    pub fn attach(
        platform: P,
        peer: DomId,
        refs: &QueueRefs,
        features: Features,
        stats: Arc<Stats>,
    ) -> Result<Self, AttachError> {
        let queues = core::slice::from_ref(refs);
        let record = VifRecord::private(&SessionRefs { peer, device: 0, queues, control: None });
        let record = record.map_err(|error| AttachError::Record { ring: "transmit", error })?;
        let groups = record.groups().ok_or(AttachError::no_section("transmit"))?;
        let parts = (&record, 0, &Arc::new(groups));
        Self::attach_recorded(platform, peer, refs, features, stats, parts)
    }
}

impl<P: BackendPlatform, B: PacketBuf, R: SharedMemory + Clone> Queue<P, B, R> {
    /// Maps the rings of a frontend in domain `peer` and binds its event channels, as queue number
    /// `index` of a vif with this record and these groups. If the session is resumed, continues at
    /// the position in the record.
    ///
    /// # Errors
    /// An [`AttachError`]; nothing stays mapped or bound.
    pub fn attach_recorded(
        platform: P,
        peer: DomId,
        refs: &QueueRefs,
        features: Features,
        stats: Arc<Stats>,
        (record, index, groups): (&VifRecord<R>, usize, &Arc<Groups<Part<R>>>),
    ) -> Result<Self, AttachError> {
        let groups = Arc::clone(groups);
        let sections = record.queue(index).ok_or(AttachError::no_section("transmit"))?;
        let map = |ring, gref| {
            let mapped = platform.map(peer, core::slice::from_ref(&gref), Access::ReadWrite);
            mapped.map_err(|status| AttachError::Map { ring, status })
        };
        let [tx_section, rx_section] = sections;
        let resumed = record.is_resumed();
        let tx = map("transmit", refs.tx_ring)?;
        let tx = tx::Tx::new(Ring::attach(tx, Direction::Transmit, tx_section, resumed)?);
        let rx = map("receive", refs.rx_ring)?;
        let rx = rx::Rx::new(Ring::attach(rx, Direction::Receive, rx_section, resumed)?);
        let (tx_channel, rx_channel) = match refs.events {
            EventPorts::Shared(port) => (platform.bind_interdomain(peer, port)?, None),
            EventPorts::Split { tx, rx } => {
                let tx = platform.bind_interdomain(peer, tx)?;
                (tx, Some(platform.bind_interdomain(peer, rx)?))
            }
        };
        Ok(Self {
            platform,
            peer,
            features,
            access: PageAccess::Copy,
            tx,
            rx,
            tx_channel,
            rx_channel,
            _counted: Counted::new(&stats),
            stats,
            limit: Arc::default(),
            groups,
            headroom: Arc::default(),
            link: None,
            control: None,
            staged: None,
            now: Duration::ZERO,
            failed: None,
        })
    }
}
