//! The in-flight record of a vif, in memory that survives the process: requests that its queues
//! have taken and that have no published response, and the configuration that the guest has made.

use super::ring::Direction;
use super::setup::SetupLog;
use super::{ControlRefs, EventPorts, Groups, QueueRefs};
use pvio_grant_table::DomId;
use pvio_ring::inflight::{Record, RecordError, SessionKey};
use pvio_ring::shm::{HeapMemory, PAGE_SIZE, Part, SharedMemory};

/// Device type in a record's key: `vif` as a number.
const KIND: u64 = u64::from_be_bytes(*b"\0\0\0\0\0vif");

/// Identity of a session of a vif.
#[derive(Clone, Copy, Debug)]
pub struct SessionRefs<'a> {
    /// Domain of the frontend.
    pub peer: DomId,
    /// Number of the device.
    pub device: u32,
    /// Its queues.
    pub queues: &'a [QueueRefs],
    /// Its control ring, if it has one.
    pub control: Option<ControlRefs>,
}

impl SessionRefs<'_> {
    fn key(&self) -> SessionKey {
        let mut key = SessionKey::new();
        key.add(KIND).add(self.peer.0.into()).add(self.device.into());
        key.add(self.queues.len() as u64);
        for QueueRefs { tx_ring, rx_ring, events } in self.queues {
            let (tx, rx) = match events {
                EventPorts::Shared(port) => (*port, None),
                EventPorts::Split { tx, rx } => (*tx, Some(*rx)),
            };
            key.add(tx_ring.0.into()).add(rx_ring.0.into()).add(tx.0.into());
            // `u64::MAX` is not a valid port: it means no separate channel.
            key.add(rx.map_or(u64::MAX, |port| port.0.into()));
        }
        let control = self.control.map(|control| (control.ring.0.into(), control.event.0.into()));
        let (ring, event) = control.unwrap_or((u64::MAX, u64::MAX));
        key.add(ring).add(event);
        key.section(Groups::<HeapMemory>::SECTION_LEN);
        let setup = SetupLog::<HeapMemory>::section_len(self.queues.len());
        key.section(if self.control.is_some() { setup } else { 0 });
        for _ in self.queues {
            for direction in [Direction::Transmit, Direction::Receive] {
                key.section(direction.section_len());
            }
        }
        key
    }

    /// Returns the size of the session's record in bytes.
    #[must_use]
    pub fn record_len(&self) -> usize {
        self.key().record_len()
    }
}

/// The in-flight record of a session.
#[derive(Clone, Debug)]
pub struct VifRecord<R> {
    record: Record<R>,
    resumed: bool,
}

impl<R: SharedMemory + Clone> VifRecord<R> {
    /// Creates the record of a new session. It is not valid before [`commit`](Self::commit).
    ///
    /// # Errors
    /// [`RecordError::Size`].
    pub fn create(memory: R, session: &SessionRefs<'_>) -> Result<Self, RecordError> {
        Ok(Self { record: Record::create(memory, session.key())?, resumed: false })
    }

    /// Opens the record of the session that another process wrote.
    ///
    /// # Errors
    /// A [`RecordError`]: the session cannot be resumed.
    pub fn open(memory: R, session: &SessionRefs<'_>) -> Result<Self, RecordError> {
        Ok(Self { record: Record::open(memory, session.key())?, resumed: true })
    }

    /// Marks the record as valid. Called when all queues are attached.
    pub fn commit(&self) {
        self.record.commit();
    }

    /// Marks the record as invalid: the session has ended.
    pub fn invalidate(&self) {
        self.record.invalidate();
    }

    /// Whether another process started the session.
    #[must_use]
    pub const fn is_resumed(&self) -> bool {
        self.resumed
    }

    /// Returns the multicast groups that the guest has selected.
    #[must_use]
    pub fn groups(&self) -> Option<Groups<Part<R>>> {
        self.record.section(0).map(Groups::new)
    }

    pub(super) fn control(&self) -> Option<Part<R>> {
        self.record.section(1)
    }

    /// Returns the sections of a queue's transmit ring and receive ring.
    pub(super) fn queue(&self, index: usize) -> Option<[Part<R>; 2]> {
        let transmit = index.checked_mul(2)?.checked_add(2)?;
        let section = |index| self.record.section(index);
        Some([section(transmit)?, section(transmit.checked_add(1)?)?])
    }
}

impl VifRecord<HeapMemory> {
    /// Creates a record in private memory, which is lost when the process ends.
    ///
    /// # Errors
    /// [`RecordError::Size`].
    pub(super) fn private(session: &SessionRefs<'_>) -> Result<Self, RecordError> {
        let pages = session.record_len().div_ceil(PAGE_SIZE).max(1);
        Self::create(HeapMemory::pages(pages), session)
    }
}
