//! Settings that can be changed while the NIC is connected, and that persist over sessions.

use super::{Nic, WrittenKeys};
use crate::control::Control;
use crate::fault::BackendFault;
use crate::groups::{GroupError, Groups, Hearing};
use crate::packet::Group;
use crate::queue::Queue;
use crate::rx::HEADROOM_MAX;
use crate::shared_rings::SharedRings;
use crate::steering::{Steering, SteeringState};
use core::time::Duration;
use pvio_event_channel::EventChannels;
use pvio_grant_table::Granter;

impl<P: Granter + EventChannels + Clone> Nic<P> {
    /// Requests this distribution of received packets over the [queues](Self::queues), also from
    /// later backends; `None` leaves the choice to the backend. If the backend does not support it,
    /// packets are distributed as it chooses, and [`steering`](Self::steering) returns why. A NIC
    /// that was created neither [steered](Self::steered_by) nor with staging has no control ring
    /// until its next session.
    pub fn steer(&mut self, steering: Option<Steering>) {
        self.steering = steering;
        if self.connected {
            self.steer_queues();
        }
    }

    /// Returns the state of the steering that was last [requested](Self::steer).
    #[must_use]
    pub fn steering(&self) -> SteeringState {
        let Some(SharedRings { queues, control }) = &self.session else {
            return SteeringState::Off;
        };
        match control {
            Some(control) if queues.len() > 1 => control.steering(),
            _ if self.steering.is_some() => SteeringState::NotOffered,
            _ => SteeringState::Off,
        }
    }

    /// Joins a multicast group, also after a backend restart. Calls of [queues](Self::queues) send
    /// the change to the backend. It has an effect only while multicast packets are
    /// [filtered](Self::filter_groups).
    ///
    /// # Errors
    /// [`GroupError`].
    pub fn join(&mut self, group: Group) -> Result<(), GroupError> {
        self.groups.join(group)
    }

    /// Leaves a multicast group. Returns whether it was joined.
    pub fn leave(&mut self, group: Group) -> bool {
        self.groups.leave(group)
    }

    /// Sets whether only [joined](Self::join) groups are received. If the backend supports the
    /// request while connected, it is sent once the backend has all groups
    /// ([`has_news`](Self::has_news)), so that no packet of a joined group is lost. Otherwise it is
    /// sent when a session begins.
    pub fn filter_groups(&mut self, chosen: bool) {
        self.chooses = chosen;
    }

    /// Returns the groups and their state.
    #[must_use]
    pub const fn groups(&self) -> &Groups {
        &self.groups
    }

    /// Returns the state of the backend's multicast filter.
    #[must_use]
    pub fn hearing(&self) -> Hearing {
        match (self.written.chooses, self.groups.refused().next()) {
            _ if self.chooses && !self.offer.multicast_control && self.session.is_some() => {
                Hearing::NotOffered
            }
            (_, Some(_)) if self.chooses => Hearing::Overflowed,
            (true, _) => Hearing::Joined,
            (false, _) => Hearing::All,
        }
    }

    /// Requests `bytes` bytes of headroom before received data in every page, at most
    /// [`HEADROOM_MAX`], also from later backends: for programs that prepend headers (XDP). 0 ends
    /// it. A connected NIC applies the change through the state Reconfiguring
    /// ([`has_news`](Self::has_news)) without interruption. While it is in progress, packets with
    /// and without headroom arrive; each [reports](crate::Incoming::headroom) its own.
    pub fn ask_headroom(&mut self, bytes: u16) {
        self.headroom = bytes.min(HEADROOM_MAX);
        if self.connected {
            self.expect_headroom();
        }
    }

    /// Returns the headroom that the backend has accepted, in bytes: 0 if it does not support
    /// headroom.
    #[must_use]
    pub const fn headroom_given(&self) -> u16 {
        self.written.taken
    }

    /// Requests the backend to unmap the staged pages, before the NIC is closed: afterwards it
    /// accesses each page with a grant operation. It is done when the NIC [is
    /// settled](Self::is_settled). A backend unmaps them at the end of a session in any case.
    pub fn unstage(&mut self) {
        if let Some(control) = self.control_mut() {
            control.unstage();
        }
    }

    /// Returns the number of pages that the backend reported as staged.
    #[must_use]
    pub fn staged(&self) -> usize {
        self.control().map_or(0, Control::staged)
    }

    /// Returns the number of pages that the backend did not report as unmapped when requested.
    #[must_use]
    pub fn not_unstaged(&self) -> usize {
        self.control().map_or(0, Control::not_unstaged)
    }

    /// Sets the current time, relative to any origin, never decreasing. Without it, a caller that
    /// waits for [`is_settled`](Self::is_settled) waits without limit if the backend does not
    /// respond.
    pub fn set_clock(&mut self, now: Duration) {
        if let Some(control) = self.control_mut() {
            control.set_clock(now);
        }
    }

    /// Returns whether the control ring has no request left to send or outstanding, or the backend
    /// has left a request outstanding for [`PATIENCE`](crate::control::PATIENCE), by the
    /// [clock](Self::set_clock).
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.control().is_none_or(|control| control.is_done() || control.is_silent())
    }

    /// Returns whether a change must be written to xenstore: the driver must be stepped.
    #[must_use]
    pub fn has_news(&self) -> bool {
        let chooses = self.written.chooses != self.is_choosing();
        let room = self.written.headroom != self.headroom;
        self.connected
            && (self.offer.dynamic_multicast_control && chooses || self.offer.xdp_headroom && room)
    }

    /// Calls [`Queue::final_check`] of every queue, and that of the control ring. Wait only if it
    /// returns `false`, for all [channels](Self::channels).
    ///
    /// # Errors
    /// A [`BackendFault`], which is permanent.
    pub fn final_check(&mut self) -> Result<bool, BackendFault> {
        let mut found = false;
        for queue in self.queues() {
            found |= queue.final_check()?;
        }
        let control = self.control_mut().map_or(Ok(false), Control::final_check)?;
        Ok(found || control)
    }

    /// Returns every event channel that wakes this NIC, while it is connected.
    pub fn channels(&self) -> impl Iterator<Item = &P::Channel> {
        let session = self.session.as_ref().filter(|_| self.connected);
        let control = session.and_then(|session| session.control.as_ref()).map(Control::channel);
        let queues = session.into_iter().flat_map(|session| &session.queues);
        queues.flat_map(Queue::channels).chain(control)
    }

    /// Starts a session; the initial settings were written to xenstore before it.
    pub(super) fn begin(&mut self) {
        self.groups.begin();
        let headroom = if self.offer.xdp_headroom { self.headroom } else { 0 };
        // If filtering can be requested while connected, it is requested once the backend has the
        // groups.
        let chooses = self.offer.multicast_control
            && self.chooses
            && (!self.offer.dynamic_multicast_control || self.groups.are_sent());
        self.written = WrittenKeys { chooses, headroom, taken: headroom };
    }

    /// Applies the requested steering to the control ring and the queues.
    pub(super) fn steer_queues(&mut self) {
        let Some(SharedRings { queues, control }) = &mut self.session else { return };
        let Some(control) = control.as_mut().filter(|_| queues.len() > 1) else { return };
        let types = self.steering.as_ref().map(Steering::types).unwrap_or_default();
        queues.iter_mut().for_each(|queue| queue.take_hashes(types));
        control.steer(self.steering.clone(), queues.len());
    }

    /// Applies the requested headroom to the queues.
    pub(super) fn expect_headroom(&mut self) {
        let Some(session) = self.session.as_mut().filter(|_| self.offer.xdp_headroom) else {
            return;
        };
        let bytes = self.headroom;
        session.queues.iter_mut().for_each(|queue| queue.take_headroom(bytes));
    }

    /// Returns whether the backend should filter: it has all joined groups.
    pub(super) fn is_choosing(&self) -> bool {
        let known = self.written.chooses || self.groups.are_sent();
        self.chooses && known && self.groups.refused().next().is_none()
    }

    fn control(&self) -> Option<&Control<P>> {
        self.session.as_ref()?.control.as_ref()
    }

    fn control_mut(&mut self) -> Option<&mut Control<P>> {
        self.session.as_mut()?.control.as_mut()
    }
}
