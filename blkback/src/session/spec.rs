//! The description of a session: validated values without handles, which can be sent to the process that serves it.

use crate::config::abi;
use crate::engine::Geometry;
use crate::pages::PAGES_MOST;
use crate::path::DataPath;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use pvio_ring::RingLayout;
use pvio_ring::inflight::{RequestLog, SessionKey};
use pvio_ring::proto::blkif::Abi;
use pvio_ring::shm::{HeapMemory, PAGE_SIZE};
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::common::DeviceAddr;
use pvio_xenbus::handshake::vbd::{FrontRequest, Negotiated, Queue};

/// The way in which serving begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Begin {
    /// In a new session.
    New,
    /// In the session of an earlier process, which may have been killed by one of its requests.
    Resumed,
    /// In the same session, after its queues were stopped for a media change.
    Again,
}

/// The identity of a session: everything that its in-flight record depends on. A session with
/// another identity is another session.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct SessionIdentity {
    /// The address of the device.
    pub addr: DeviceAddr,
    /// The frontend's request layout.
    pub abi: Abi,
    /// Whether the frontend requested persistent grants, which need not be advertised.
    pub persistent: bool,
    /// The ring references and the event channel of each queue.
    pub queues: Vec<Queue>,
}

/// A session of a disk: everything that serving it requires besides handles.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct SessionSpec {
    /// The device and its rings.
    pub identity: SessionIdentity,
    /// The negotiated features.
    pub negotiated: Negotiated,
    /// The way guest pages are accessed.
    pub data_path: DataPath,
    /// The geometry of the disk as the guest sees it: without discard if the toolstack disabled it,
    /// and read-only if the toolstack or the image requires it.
    pub geometry: Geometry,
}

impl SessionIdentity {
    /// Returns the identity of the session that a frontend requests.
    #[must_use]
    pub fn new(addr: DeviceAddr, request: &FrontRequest) -> Self {
        Self {
            addr,
            abi: abi(request.protocol),
            persistent: request.persistent,
            queues: request.queues.clone(),
        }
    }

    /// Returns the key of the session's in-flight record.
    ///
    /// # Errors
    /// A [`Fault`] if a ring has an invalid number of pages.
    pub fn key(&self) -> Result<SessionKey, Fault> {
        let Self { addr, abi, persistent, queues } = self;
        let mut key = SessionKey::new();
        for byte in addr.kind.as_str().bytes() {
            key.add(byte.into());
        }
        key.add(0).add(addr.back.0.into()).add(addr.front.0.into()).add(addr.index.into());
        key.add(abi.slot_size() as u64).add((*persistent).into());
        for queue in queues {
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

    /// Returns the size of the session's in-flight record, in bytes.
    ///
    /// # Errors
    /// As [`key`](Self::key).
    pub fn record_len(&self) -> Result<usize, Fault> {
        Ok(self.key()?.record_len())
    }
}

impl SessionSpec {
    /// Returns the maximum number of segments of an indirect request; 0 if indirect requests are
    /// not used.
    #[must_use]
    pub fn max_indirect_segments(&self) -> u32 {
        let most = u32::try_from(PAGES_MOST).unwrap_or(u32::MAX);
        self.negotiated.max_indirect_segments.min(most)
    }

    /// Returns the name of the disk in logs and of its threads.
    #[must_use]
    pub fn disk_name(&self) -> String {
        let DeviceAddr { front, index, .. } = self.identity.addr;
        format!("vbd-{front}-{index}")
    }
}

/// Returns the name of the in-flight record of a device, which is also a file name.
#[must_use]
pub fn record_name(addr: DeviceAddr) -> String {
    format!("{}-{}-{}", addr.kind.as_str(), addr.front, addr.index)
}
