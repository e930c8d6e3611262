//! What a queue is told besides packets: by the guest over the control ring, by its siblings, by the
//! device.

use super::control::{Control, ControlContext};
use super::record::{SessionRefs, VifRecord};
use super::siblings::{Link, Order, Outcome, Siblings};
use super::staged::Staged;
use super::{ControlRefs, EventPorts, Queue, QueueError, QueueRefs};
use crate::Platform;
use crate::fault::AttachError;
use crate::port::PacketBuf;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU16, Ordering};
use pvio_event_channel::Port;
use pvio_grant_table::policy::GrantsStay;
use pvio_grant_table::{Access, GrantRef};
use pvio_ring::proto::netif::{CtrlStatus, GrefEntry};
use pvio_ring::shm::SharedMemory;

/// Bytes that a vif leaves free before the data in every receive slot, which anybody may change while
/// it runs (`xdp-headroom`).
#[derive(Debug, Default)]
pub struct Headroom(AtomicU16);

impl Headroom {
    /// The most there is: half a page, so that a packet of the largest size takes 33 slots.
    pub const MOST: u16 = 2048;

    /// Leaves so many bytes free from now on, at most [`MOST`](Self::MOST).
    pub fn set(&self, bytes: u16) {
        self.0.store(bytes.min(Self::MOST), Ordering::Relaxed);
    }

    /// How many are left free.
    #[must_use]
    pub fn get(&self) -> u16 {
        self.0.load(Ordering::Relaxed)
    }
}

impl<P: Platform, B: PacketBuf> Queue<P, B> {
    /// Serves the guest's control ring as [`serve_control_recorded`](Self::serve_control_recorded) does,
    /// with a record that does not outlive the process.
    ///
    /// # Errors
    /// An [`AttachError`]; nothing stays mapped or bound.
    pub fn serve_control(&mut self, refs: &ControlRefs, stages: bool) -> Result<(), AttachError> {
        // Of the queues, their number alone matters here.
        let none = QueueRefs {
            tx_ring: GrantRef(0),
            rx_ring: GrantRef(0),
            events: EventPorts::Shared(Port(0)),
        };
        let count = self.link.as_ref().map_or(1, |link| link.siblings().len());
        let queues = alloc::vec![none; count];
        let session =
            SessionRefs { peer: self.peer, device: 0, queues: &queues, control: Some(*refs) };
        let record = VifRecord::private(&session);
        let record = record.map_err(|error| AttachError::Record { ring: "control", error })?;
        self.serve_control_recorded(refs, stages, &record)
    }
}

impl<P: Platform, B: PacketBuf, R: SharedMemory + Clone> Queue<P, B, R> {
    /// Makes it one of the queues of a vif, by its number; what is steered to another goes there from
    /// now on. Without such a number it stays by itself.
    pub fn join(&mut self, siblings: &Arc<Siblings<B>>, index: usize) {
        self.link = Link::new(siblings, index);
    }

    /// Serves the guest's control ring as well, for all queues that it was [joined](Self::join)
    /// with: to be asked of the first. `stages` says whether the guest may have pages kept mapped,
    /// [`STAGED_MAX`](super::STAGED_MAX) of each queue. In a session that is resumed, what the guest had
    /// set up is in force again, but for the pages: see [`restage`](Self::restage).
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
        let queues = self.link.as_ref().map_or(1, |link| link.siblings().len());
        let control = Control::attach(mapped, channel, queues, stages, recorded)?;
        if let Some(link) = &self.link {
            link.siblings().set_hash(&control.setup().hash);
        }
        self.control = Some(control);
        Ok(())
    }

    /// The pages that the guest had staged for a queue when its session was taken over: to be asked of
    /// the queue that serves the control ring.
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

    /// Maps pages again that the guest had staged for this queue, before it moves a packet.
    ///
    /// # Errors
    /// [`AttachError::Staged`], of the first that cannot be mapped.
    pub fn restage(&mut self, list: &[GrefEntry]) -> Result<(), AttachError> {
        if list.is_empty() {
            return Ok(());
        }
        let Self { platform, peer, staged, .. } = self;
        // The guest promised when it staged them.
        let promise = GrantsStay::promised_by_the_peer();
        let pages = staged.get_or_insert_with(|| Staged::new(promise));
        for entry in list {
            if pages.add(platform, *peer, core::slice::from_ref(entry)) != CtrlStatus::Success {
                return Err(AttachError::Staged { gref: entry.gref });
            }
        }
        Ok(())
    }

    /// How much is left free before the data of received packets, to be changed at any time.
    #[must_use]
    pub const fn headroom(&self) -> &Arc<Headroom> {
        &self.headroom
    }

    /// Has this in common with other queues of the vif from now on.
    pub fn share_headroom(&mut self, headroom: &Arc<Headroom>) {
        self.headroom = Arc::clone(headroom);
    }

    /// Pages of the guest's that are kept mapped now.
    #[must_use]
    pub fn staged(&self) -> usize {
        self.staged.as_ref().map_or(0, Staged::len)
    }

    /// Does what the guest asks for over the control ring, and what siblings have left.
    pub(super) fn read_mail(&mut self) -> Result<(), QueueError> {
        let Self { platform, peer, link, control, staged, stats, .. } = self;
        let Some(link) = link else { return Ok(()) };
        let (peer, copier) = (*peer, &*platform);
        if let Some(control) = control {
            let around = ControlContext { copier, peer, siblings: link.siblings(), stats };
            control.step(&around)?;
        }
        link.update();
        while let Some(mut order) = link.next_order() {
            let Order { list, adds, .. } = &mut order;
            // Asking for it is the promise: netif.h, "Static Grants".
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
            link.tell(Outcome { order, status, data });
        }
        if let Some(control) = control {
            let around =
                ControlContext { copier: &*platform, peer, siblings: link.siblings(), stats };
            while let Some(outcome) = link.next_outcome() {
                control.finish(outcome, &around);
            }
            control.notify()?;
        }
        Ok(())
    }
}
