//! Link to capture files, or back to the guest.
#![forbid(unsafe_code)]

use super::{LinkOps, LinkParams, WorkerSetup};
use crate::file::{FilePort, Recording, packets_of};
use crate::worker::Worker;
use alloc::collections::VecDeque;
use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_event_channel::BackendPlatform;
use pvio_ring::shm::SharedMemory;
use pvio_xenbus::driver::Fault;
use std::os::fd::AsFd;
use std::path::Path;

/// Link to files.
pub(in crate::host) enum FileLink {
    /// The guest receives what it sends.
    Loopback,
    Files {
        recording: Option<Arc<Recording>>,
        /// Packets still to be sent to the guest, by its first queue.
        replay: VecDeque<Vec<u8>>,
    },
}

impl FileLink {
    /// Opens the file to which the guest's packets are written, and reads the file whose packets
    /// are sent to it.
    pub fn open(
        record: Option<&Path>,
        replay: Option<&Path>,
        params: &LinkParams,
    ) -> Result<Self, Fault> {
        let replay = replay.map(packets_of).transpose();
        let replay = replay.map_err(|text| Fault::new("nic-replay", text))?;
        let begin = |path: &Path| {
            Recording::begin(path, &params.name).map_err(|e| {
                let text = format!("the recording {} cannot be written: {e}", path.display());
                Fault::new("nic-record", text)
            })
        };
        let recording = record.map(begin).transpose()?;
        Ok(Self::Files { recording, replay: replay.unwrap_or_default() })
    }
}

impl LinkOps for FileLink {
    fn start<P, R>(&mut self, setup: WorkerSetup<P, R>) -> Result<Worker, Fault>
    where
        P: BackendPlatform + Send + 'static,
        P::Channel: AsFd,
        R: SharedMemory + Clone + Send + Sync + 'static,
    {
        match self {
            Self::Loopback => setup.spawn(|_| FilePort::loopback(), |_| {}),
            Self::Files { recording, replay } => {
                let (recording, replay) = (recording.clone(), core::mem::take(replay));
                setup.spawn(move |_| FilePort::files(recording, replay), |_| {})
            }
        }
    }
}
