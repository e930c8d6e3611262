//! The in-flight record of a session: created, resumed and removed.

use super::VbdServer;
use crate::engine::FlushState;
use crate::path::DataPath;
use crate::queue::QueueRecord;
use alloc::format;
use alloc::string::String;
use pvio_event_channel::BackendPlatform;
use pvio_ring::inflight::{Record, RecordError, RequestLog, SessionKey};
use pvio_ring::proto::blkif::Abi;
use pvio_ring::shm::{HeapMemory, PAGE_SIZE, SharedMemory};
use pvio_ring::{BackRing, RingLayout};
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::common::DeviceAddr;
use pvio_xenbus::handshake::vbd::FrontRequest;

/// The way in which serving begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Begin {
    /// In a new session.
    New,
    /// In the session of an earlier process.
    Resumed,
    /// In the same session and process, after a media change.
    Again,
}

/// The in-flight record of a session.
#[derive(Debug)]
pub(super) struct SessionRecord<R> {
    device: String,
    record: Record<R>,
}

/// Returns the key that identifies a session: it covers everything that the session's queues depend
/// on.
pub(super) fn key(addr: DeviceAddr, abi: Abi, request: &FrontRequest) -> Result<SessionKey, Fault> {
    let mut key = SessionKey::new();
    for byte in addr.kind.as_str().bytes() {
        key.add(byte.into());
    }
    key.add(0).add(addr.back.0.into()).add(addr.front.0.into()).add(addr.index.into());
    key.add(abi.slot_size() as u64).add(request.persistent.into());
    for queue in &request.queues {
        key.add(queue.ring_refs.len() as u64).add(queue.event_channel.into());
        for gref in &queue.ring_refs {
            key.add((*gref).into());
        }
        let bytes = queue.ring_refs.len().saturating_mul(PAGE_SIZE);
        let layout = RingLayout::new(bytes, abi.slot_size())
            .ok_or_else(|| Fault::new("ring-geometry", "invalid number of ring pages"))?;
        key.section(RequestLog::<HeapMemory>::section_len(layout));
    }
    Ok(key)
}

impl<R: SharedMemory + Clone> SessionRecord<R> {
    /// Creates a new record, which is not valid until [`commit`](Self::commit), or opens the one of
    /// an earlier process.
    pub fn begin<P, S>(
        server: &mut S,
        addr: DeviceAddr,
        key: SessionKey,
        begin: Begin,
    ) -> Result<Self, Fault>
    where
        P: BackendPlatform,
        S: VbdServer<P, Record = R>,
    {
        let device = device(addr);
        let resumed = begin == Begin::Resumed;
        let memory = server.record(&device, key.record_len(), resumed)?;
        let open = if resumed { Record::open } else { Record::create };
        let record = open(memory, key).map_err(fault)?;
        Ok(Self { device, record })
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

    /// Returns whether the process that owns or owned the record maps pages for single requests.
    pub fn maps_requests(&self) -> bool {
        self.record.maps_requests()
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

    /// Ends the session: it cannot be resumed any more.
    pub fn end<P: BackendPlatform, S: VbdServer<P, Record = R>>(self, server: &mut S) {
        self.record.invalidate();
        server.remove_record(&self.device);
    }
}

/// Returns the name of a device's record.
pub(super) fn device(addr: DeviceAddr) -> String {
    format!("{}-{}-{}", addr.kind.as_str(), addr.front, addr.index)
}

fn fault(error: RecordError) -> Fault {
    Fault::of(error.code(), &error)
}
