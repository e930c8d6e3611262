//! Link to capture files, or back to the guest.
#![forbid(unsafe_code)]

use super::{LinkDescription, LinkOps, LinkParams, WorkerSetup, not_duplicated};
use crate::file::{FilePort, Recording, packets_in};
use crate::worker::Worker;
use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_event_channel::BackendPlatform;
use pvio_ring::shm::SharedMemory;
use pvio_xenbus::driver::Fault;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// Link to files.
pub(in crate::host) enum FileLink {
    /// The guest receives what it sends.
    Loopback,
    Files {
        /// Name of the vif in the recording.
        interface: String,
        recording: Option<Arc<Recording>>,
        /// Packets still to be sent to the guest, by its first queue.
        replay: VecDeque<Vec<u8>>,
        /// The file of these packets and its name, for another process, until that sends them.
        replayed: Option<(File, String)>,
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
        let open = |path: &Path| {
            let shown = path.display().to_string();
            let file = File::open(path).map_err(|e| format!("{shown} cannot be read: {e}"))?;
            let packets = packets_in(file.try_clone().map_err(|e| e.to_string())?, &shown)?;
            Ok((packets, (file, shown)))
        };
        let replay = replay.map(open).transpose();
        let replay = replay.map_err(|text: String| Fault::new("nic-replay", text))?;
        let begin = |path: &Path| {
            Recording::begin(path, &params.name).map_err(|e| {
                let text = format!("the recording {} cannot be written: {e}", path.display());
                Fault::new("nic-record", text)
            })
        };
        let recording = record.map(begin).transpose()?;
        let (replay, replayed) = replay.unzip();
        let (interface, replay) = (params.name.clone(), replay.unwrap_or_default());
        Ok(Self::Files { interface, recording, replay, replayed })
    }

    /// Returns the link to files that another process opened.
    pub fn from_opened(
        files: Vec<OwnedFd>,
        interface: &str,
        record: bool,
        replay: Option<&str>,
    ) -> Result<Self, Fault> {
        let mut files = files.into_iter().map(File::from);
        let append = |file| {
            Recording::append(file, interface).map_err(|e| {
                Fault::new("nic-record", format!("the recording cannot be written: {e}"))
            })
        };
        let recording = if record { files.next().map(append).transpose()? } else { None };
        let replay = replay.zip(files.next()).map(|(shown, file)| packets_in(file, shown));
        let replay = replay.transpose().map_err(|text| Fault::new("nic-replay", text))?;
        let (interface, replay) = (interface.into(), replay.unwrap_or_default());
        Ok(Self::Files { interface, recording, replay, replayed: None })
    }
}

impl LinkOps for FileLink {
    fn hand_over(&mut self) -> Result<Option<(LinkDescription, Vec<OwnedFd>)>, Fault> {
        let Self::Files { interface, recording, replay, replayed } = self else {
            return Ok(Some((LinkDescription::Loopback, Vec::new())));
        };
        let record = recording.as_ref().map(|recording| recording.to_fd()).transpose();
        let record = record.map_err(|e| not_duplicated(&e))?;
        // The packets are sent once.
        replay.clear();
        let (file, shown) = replayed.take().unzip();
        let description = LinkDescription::Files {
            interface: interface.clone(),
            record: record.is_some(),
            replay: shown,
        };
        Ok(Some((description, record.into_iter().chain(file.map(OwnedFd::from)).collect())))
    }

    fn start<P, R>(&mut self, setup: WorkerSetup<P, R>) -> Result<Worker, Fault>
    where
        P: BackendPlatform + Send + 'static,
        P::Channel: AsFd,
        R: SharedMemory + Clone + Send + Sync + 'static,
    {
        match self {
            Self::Loopback => setup.spawn(|_| FilePort::loopback(), |_| {}),
            Self::Files { recording, replay, .. } => {
                let (recording, replay) = (recording.clone(), core::mem::take(replay));
                setup.spawn(move |_| FilePort::files(recording, replay), |_| {})
            }
        }
    }
}
