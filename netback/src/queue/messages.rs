//! Events of a queue other than packets: control ring requests, messages from other queues, and
//! changed settings.

use super::control::{Control, ControlContext};
use super::queue_set::{Link, QueueSet, StagingCommand, StagingResult};
use super::record::{SessionRefs, VifRecord};
use super::staged::Staged;
use super::{ControlRefs, EventPorts, Queue, QueueError, QueueRefs};
use crate::fault::AttachError;
use crate::port::PacketBuf;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU16, Ordering};
use pvio_event_channel::{BackendPlatform, Port};
use pvio_grant_table::policy::GrantsStay;
use pvio_grant_table::{Access, GrantRef};
use pvio_ring::proto::netif::{CtrlStatus, GrefEntry};
use pvio_ring::shm::SharedMemory;

/// Bytes that a vif leaves free before the data in every receive slot (`xdp-headroom`). Any thread
/// may change it at any time.
#[derive(Debug, Default)]
pub struct Headroom(AtomicU16);

impl Headroom {
    /// Largest headroom: half a page, so that the largest packet takes 33 slots.
    pub const MOST: u16 = 2048;

    /// Sets the headroom in bytes, limited to [`MOST`](Self::MOST).
    pub fn set(&self, bytes: u16) {
        self.0.store(bytes.min(Self::MOST), Ordering::Relaxed);
    }

    /// Returns the headroom in bytes.
    #[must_use]
    pub fn get(&self) -> u16 {
        self.0.load(Ordering::Relaxed)
    }
}

impl<P: BackendPlatform, B: PacketBuf> Queue<P, B> {
    /// Serves the guest's control ring as [`serve_control_recorded`](Self::serve_control_recorded)
    /// does, with a record in private memory that is lost when the process ends.
    ///
    /// # Errors
    /// An [`AttachError`]; nothing stays mapped or bound.
    pub fn serve_control(&mut self, refs: &ControlRefs, stages: bool) -> Result<(), AttachError> {
        // Only the number of queues matters here.
        let none = QueueRefs {
            tx_ring: GrantRef(0),
            rx_ring: GrantRef(0),
            events: EventPorts::Shared(Port(0)),
        };
        let count = self.link.as_ref().map_or(1, |link| link.set().len());
        let queues = alloc::vec![none; count];
        let session =
            SessionRefs { peer: self.peer, device: 0, queues: &queues, control: Some(*refs) };
        let record = VifRecord::private(&session);
        let record = record.map_err(|error| AttachError::Record { ring: "control", error })?;
        self.serve_control_recorded(refs, stages, &record)
    }
}

impl<P: BackendPlatform, B: PacketBuf, R: SharedMemory + Clone> Queue<P, B, R> {
    /// Makes this queue number `index` of a vif. Packets that are steered to another queue are
    /// passed to that queue from then on. If `index` is out of range, the queue stays standalone.
    pub fn join(&mut self, set: &Arc<QueueSet<B>>, index: usize) {
        self.link = Link::new(set, index);
    }

    /// Serves the guest's control ring as well, for all queues that this one was
    /// [joined](Self::join) with. Only the first queue may do so. `stages` enables staging grants,
    /// up to [`STAGED_MAX`](super::STAGED_MAX) for each queue. In a resumed session, the recorded
    /// configuration is in force again, except for staged pages: see [`restage`](Self::restage).
    ///
    /// # Errors
    /// An [`AttachError`]; nothing stays mapped or bound.
    pub fn serve_control_recorded(
        &mut self,
        refs: &ControlRefs,
        stages: bool,
        record: &VifRecord<R>,
    ) -> Result<(), AttachError> {
        let ring = "control";
        let mapped = self.platform.map(self.peer, &[refs.ring], Access::ReadWrite);
        let mapped = mapped.map_err(|status| AttachError::Map { ring, status })?;
        let channel = self.platform.bind_interdomain(self.peer, refs.event)?;
        let section = record.control().ok_or(AttachError::no_section(ring))?;
        let recorded = (section, record.is_resumed());
        let queues = self.link.as_ref().map_or(1, |link| link.set().len());
        let control = Control::attach(mapped, channel, queues, stages, recorded)?;
        if let Some(link) = &self.link {
            link.set().set_hash(&control.setup().hash);
        }
        self.control = Some(control);
        Ok(())
    }

    /// Returns the pages that the guest had staged for a queue when its session was taken over.
    /// Available from the queue that serves the control ring.
    #[must_use]
    pub fn staged_before(&self, index: usize) -> Vec<GrefEntry> {
        let staged = self.control.as_ref().and_then(|c| c.setup().staged.get(index));
        let entry = |(gref, read_only): (&GrantRef, &bool)| GrefEntry {
            gref: *gref,
            read_only: *read_only,
            status: 0,
        };
        staged.into_iter().flatten().map(entry).collect()
    }

    /// Maps the pages again that the guest had staged for this queue. Called before the first
    /// packet.
    ///
    /// # Errors
    /// [`AttachError::Staged`] for the first page that cannot be mapped.
    pub fn restage(&mut self, list: &[GrefEntry]) -> Result<(), AttachError> {
        if list.is_empty() {
            return Ok(());
        }
        let Self { platform, peer, staged, .. } = self;
        // The guest made the promise when it staged the pages.
        let promise = GrantsStay::promised_by_the_peer();
        let pages = staged.get_or_insert_with(|| Staged::new(promise));
        for entry in list {
            if pages.add(platform, *peer, core::slice::from_ref(entry)) != CtrlStatus::Success {
                return Err(AttachError::Staged { gref: entry.gref });
            }
        }
        Ok(())
    }

    /// Returns the headroom of received packets, which may be changed at any time.
    #[must_use]
    pub const fn headroom(&self) -> &Arc<Headroom> {
        &self.headroom
    }

    /// Makes this queue use a headroom that it shares with other queues of the vif.
    pub fn share_headroom(&mut self, headroom: &Arc<Headroom>) {
        self.headroom = Arc::clone(headroom);
    }

    /// Returns the number of staged pages that are mapped.
    #[must_use]
    pub fn staged(&self) -> usize {
        self.staged.as_ref().map_or(0, Staged::len)
    }

    /// Serves the control ring, commands from other queues and results of commands.
    pub(super) fn handle_messages(&mut self) -> Result<(), QueueError> {
        let Self { platform, peer, link, control, staged, stats, .. } = self;
        let Some(link) = link else { return Ok(()) };
        let (peer, copier) = (*peer, &*platform);
        if let Some(control) = control {
            let context = ControlContext { copier, peer, set: link.set(), stats };
            control.step(&context)?;
        }
        link.update();
        while let Some(mut command) = link.next_command() {
            let StagingCommand { list, adds, .. } = &mut command;
            // The request implies the promise: netif.h, "Static Grants".
            let promise = GrantsStay::promised_by_the_peer();
            let pages = staged.get_or_insert_with(|| Staged::new(promise));
            let (status, data) = if *adds {
                (pages.add(platform, peer, list), 0)
            } else {
                (CtrlStatus::Success, pages.remove(list))
            };
            if pages.len() == 0 {
                *staged = None;
            }
            link.report(StagingResult { command, status, data });
        }
        if let Some(control) = control {
            let context = ControlContext { copier: &*platform, peer, set: link.set(), stats };
            while let Some(result) = link.next_result() {
                control.finish(result, &context);
            }
            control.notify()?;
        }
        Ok(())
    }
}
