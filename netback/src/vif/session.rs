//! The in-flight record of a session: creation, take-over and end.

use super::VifServer;
use crate::fault::AttachError;
use crate::queue::{ControlRefs, Groups, QueueRefs, SessionRefs, VifRecord};
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_event_channel::{BackendPlatform, Port};
use pvio_grant_table::GrantRef;
use pvio_ring::inflight::RecordError;
use pvio_ring::shm::{Part, SharedMemory};
use pvio_xenbus::driver::{BackendContext, Fault};
use pvio_xenbus::handshake::common::DeviceAddr;
use pvio_xenbus::handshake::vif::{FrontRequest, Negotiated};

/// In-flight record of the session.
pub(super) struct SessionRecord<R> {
    device: String,
    pub record: VifRecord<R>,
    pub groups: Arc<Groups<Part<R>>>,
}

/// Rings that a frontend advertises.
pub(super) struct Rings {
    addr: DeviceAddr,
    pub queues: Vec<QueueRefs>,
    pub control: Option<ControlRefs>,
}

impl Rings {
    pub fn new(context: &BackendContext, request: &FrontRequest, negotiated: &Negotiated) -> Self {
        let control = request.ctrl.filter(|_| negotiated.ctrl_ring);
        let control = control.map(|keys| ControlRefs {
            ring: GrantRef(keys.ring_ref),
            event: Port(keys.event_channel),
        });
        let queues = request.queues.iter().map(super::refs).collect();
        Self { addr: context.addr, queues, control }
    }
}

impl<R: SharedMemory + Clone> SessionRecord<R> {
    /// Returns a new record, which is not valid yet, or the record of an earlier process.
    pub fn begin<P, S>(server: &mut S, rings: &Rings, resumed: bool) -> Result<Self, Fault>
    where
        P: BackendPlatform,
        S: VifServer<P, Record = R>,
    {
        let Rings { addr, queues, control } = rings;
        let device = device(*addr);
        let session =
            SessionRefs { peer: addr.front, device: addr.index, queues, control: *control };
        let memory = server.record(&device, session.record_len(), resumed)?;
        let open = if resumed { VifRecord::open } else { VifRecord::create };
        let record = open(memory, &session).map_err(fault)?;
        let groups = record.groups().ok_or(AttachError::no_section("transmit"))?;
        Ok(Self { device, record, groups: Arc::new(groups) })
    }

    /// Ends the session, which then cannot be resumed.
    pub fn end<P: BackendPlatform, S: VifServer<P, Record = R>>(self, server: &mut S) {
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
