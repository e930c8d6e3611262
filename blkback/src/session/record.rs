//! The in-flight record of a session: created, resumed and invalidated.

#[cfg(feature = "std")]
use super::spec::record_name;
use super::spec::{Begin, SessionIdentity};
use crate::engine::FlushState;
use crate::path::DataPath;
use crate::queue::QueueRecord;
#[cfg(feature = "std")]
use alloc::string::String;
use pvio_ring::BackRing;
use pvio_ring::inflight::{Record, RecordError};
use pvio_ring::proto::blkif::Abi;
use pvio_ring::shm::SharedMemory;
use pvio_xenbus::driver::Fault;

/// The in-flight record of a session.
#[derive(Debug)]
pub(super) struct SessionRecord<R> {
    /// Its name in logs.
    #[cfg(feature = "std")]
    device: String,
    record: Record<R>,
}

impl<R: SharedMemory + Clone> SessionRecord<R> {
    /// Creates a new record, which is not valid until [`commit`](Self::commit), or opens the one of
    /// a session that continues.
    pub fn begin(identity: &SessionIdentity, memory: R, begin: Begin) -> Result<Self, Fault> {
        let key = identity.key()?;
        let record = match begin {
            Begin::New => Record::create(memory, key),
            Begin::Resumed | Begin::Again => Record::open(memory, key),
        };
        Ok(Self {
            #[cfg(feature = "std")]
            device: record_name(identity.addr),
            record: record.map_err(fault)?,
        })
    }

    /// Returns the record of one of its queues, whose ring was just attached.
    pub fn queue<M: SharedMemory>(
        &self,
        index: usize,
        ring: &mut BackRing<M>,
        abi: Abi,
        begin: Begin,
    ) -> Result<QueueRecord<R>, Fault> {
        if begin == Begin::New {
            return QueueRecord::new(&self.record, index, ring, abi).map_err(fault);
        }
        let died = begin == Begin::Resumed;
        let found = QueueRecord::resume(&self.record, index, ring, abi, died)
            .map_err(|error| Fault::of(error.code(), &error))?;
        #[cfg(feature = "std")]
        {
            let (device, again, given_up) = (&self.device, found.inherited(), found.given_up());
            tracing::info!(device, queue = index, again, given_up, "session resumed");
        }
        Ok(found)
    }

    /// Commits the record after all queues were attached. A new record is valid from here on.
    pub fn commit(&self, flushes: &FlushState, path: DataPath, begin: Begin) {
        self.record.set_maps_requests(path == DataPath::Map);
        if begin == Begin::Resumed && self.record.flush_failed() {
            flushes.mark_failed();
        }
        self.record.set_flush_failed(flushes.has_failed());
        if begin == Begin::New {
            self.record.commit();
        }
    }
}

/// Opens the record of an earlier process's session. Returns whether that process mapped guest
/// pages for single requests: before the image is opened, those must have been unmapped.
///
/// # Errors
/// A [`Fault`]: the session cannot be resumed.
pub fn maps_requests<R: SharedMemory + Clone>(
    identity: &SessionIdentity,
    memory: R,
) -> Result<bool, Fault> {
    Ok(SessionRecord::begin(identity, memory, Begin::Resumed)?.record.maps_requests())
}

/// Marks the record in this memory invalid: its session has ended, and no process can resume it.
pub fn invalidate<R: SharedMemory + Clone>(memory: &R) {
    Record::invalidate_in(memory);
}

fn fault(error: RecordError) -> Fault {
    Fault::of(error.code(), &error)
}
