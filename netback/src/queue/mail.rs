//! What a queue is told besides packets: by the guest over the control ring, by its siblings, by the
//! device.

use super::control::{Around, Control};
use super::hash::HashConfig;
use super::notes::Notes;
use super::siblings::{Link, Order, Outcome, Siblings};
use super::staged::Staged;
use super::{Queue, QueueError};
use crate::Platform;
use crate::fault::AttachError;
use crate::port::PacketBuf;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU16, Ordering};
use pvio_event_channel::Port;
use pvio_grant_table::policy::GrantsStay;
use pvio_grant_table::{Access, GrantRef};
use pvio_ring::proto::netif::CtrlStatus;
use pvio_xenbus::handshake::vif::KeptHash;

/// What a frontend publishes of its control ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ControlRefs {
    /// `ctrl-ring-ref`.
    pub ring: GrantRef,
    /// `event-channel-ctrl`.
    pub event: Port,
}

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
    /// Makes it one of the queues of a vif, by its number; what is steered to another goes there from
    /// now on. Without such a number it stays by itself.
    pub fn join(&mut self, siblings: &Arc<Siblings<B>>, index: usize) {
        self.link = Link::new(siblings, index);
    }

    /// Serves the guest's control ring as well, for all queues that it was [joined](Self::join)
    /// with: to be asked of the first. `stages` says whether the guest may have pages kept mapped,
    /// [`STAGED_MAX`](super::STAGED_MAX) of each queue.
    ///
    /// # Errors
    /// An [`AttachError`]; nothing stays mapped or bound.
    pub fn serve_control(&mut self, refs: &ControlRefs, stages: bool) -> Result<(), AttachError> {
        let ring = "control";
        let mapped = self.platform.map(self.peer, &[refs.ring], Access::ReadWrite);
        let mapped = mapped.map_err(|status| AttachError::Map { ring, status })?;
        let channel = self.platform.bind_interdomain(self.peer, refs.event)?;
        let queues = self.link.as_ref().map_or(1, |link| link.siblings().len());
        let control = Control::attach(mapped, channel, queues, stages);
        self.control = Some(control.map_err(|fault| AttachError::Ring { ring, fault })?);
        Ok(())
    }

    /// Notes what the guest sets up, here and over its control ring if that is [served](Self::serve_control)
    /// with this queue.
    pub fn keep_notes(&mut self, notes: &Arc<Notes>) {
        if let Some(control) = &mut self.control {
            control.keep(notes);
        }
        self.notes = Some(Arc::clone(notes));
    }

    /// Has packets hashed and steered as the guest had set up before: to be asked of the queue that serves
    /// the control ring. Whether a guest of so many queues can have set that up.
    #[must_use]
    pub fn restore_hash(&mut self, kept: &KeptHash) -> bool {
        let (Some(control), Some(link)) = (&mut self.control, &self.link) else { return false };
        let siblings = link.siblings();
        let hash = HashConfig::of_kept(kept, siblings.len());
        hash.map(|hash| control.restore(hash, siblings)).is_some()
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
            let around = Around { copier, peer, siblings: link.siblings(), stats };
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
            let around = Around { copier: &*platform, peer, siblings: link.siblings(), stats };
            while let Some(outcome) = link.next_outcome() {
                control.finish(outcome, &around);
            }
            control.publish()?;
        }
        Ok(())
    }
}
