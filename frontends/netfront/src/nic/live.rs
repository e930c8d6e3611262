//! What can be asked of the backend while the NIC is connected, and holds for every session after.

use super::{Nic, WrittenKeys};
use crate::control::Control;
use crate::fault::BackendFault;
use crate::groups::{GroupError, Groups, Hearing};
use crate::packet::Group;
use crate::queue::Queue;
use crate::rx::HEADROOM_MAX;
use crate::session::Session;
use crate::steering::{Steering, SteeringState};
use core::time::Duration;
use pvio_event_channel::EventChannels;
use pvio_grant_table::Granter;

impl<P: Granter + EventChannels + Clone> Nic<P> {
    /// Has received packets spread so over the [queues](Self::queues) from now on, also by a backend that
    /// is restarted; with `None`, as it likes. A backend that cannot leaves them as they come:
    /// [`steering`](Self::steering) says so. A NIC that was made neither [steered](Self::steered_by) nor with
    /// staging has no control ring until its next session.
    pub fn steer(&mut self, steering: Option<Steering>) {
        self.steering = steering;
        if self.connected {
            self.steer_queues();
        }
    }

    /// How far the backend goes by what it was told to [`steer`](Self::steer) by.
    #[must_use]
    pub fn steering(&self) -> SteeringState {
        let Some(Session { queues, control }) = &self.session else { return SteeringState::Off };
        match control {
            Some(control) if queues.len() > 1 => control.steering(),
            _ if self.steering.is_some() => SteeringState::NotOffered,
            _ => SteeringState::Off,
        }
    }

    /// Hears a multicast group from now on, also after the backend was restarted. The backend is told while
    /// [queues](Self::queues) are used. It matters only while groups are [chosen](Self::choose_groups).
    ///
    /// # Errors
    /// [`GroupError`].
    pub fn join(&mut self, group: Group) -> Result<(), GroupError> {
        self.groups.join(group)
    }

    /// Need not hear it any more; whether it was joined.
    pub fn leave(&mut self, group: Group) -> bool {
        self.groups.leave(group)
    }

    /// Whether only groups that were [joined](Self::join) are to be heard. A backend that can be asked for
    /// that while connected is asked once it knows all of them ([`has_news`](Self::has_news)), so that
    /// none is missed; another one when a session begins.
    pub fn choose_groups(&mut self, chosen: bool) {
        self.chooses = chosen;
    }

    /// The groups, and what became of them.
    #[must_use]
    pub const fn groups(&self) -> &Groups {
        &self.groups
    }

    /// Whether only groups that were joined are heard.
    #[must_use]
    pub fn hearing(&self) -> Hearing {
        match (self.told.chooses, self.groups.refused().next()) {
            _ if self.chooses && !self.offer.multicast_control && self.session.is_some() => {
                Hearing::NotOffered
            }
            (_, Some(_)) if self.chooses => Hearing::Overflowed,
            (true, _) => Hearing::Joined,
            (false, _) => Hearing::All,
        }
    }

    /// Has the backend leave so many bytes free before received data in every page,
    /// [`HEADROOM_MAX`] at most, also after it was restarted: for a program that puts headers in
    /// front (XDP). 0 gives them back. A connected NIC changes that by Reconfiguring
    /// ([`has_news`](Self::has_news)); nothing waits for it, packets of both kinds come meanwhile, and each
    /// [says](crate::Incoming::headroom) how much room it has.
    pub fn ask_headroom(&mut self, bytes: u16) {
        self.headroom = bytes.min(HEADROOM_MAX);
        if self.connected {
            self.expect_headroom();
        }
    }

    /// How many bytes the backend leaves free, by its word: 0 where it offers no such thing.
    #[must_use]
    pub const fn headroom_given(&self) -> u16 {
        self.told.taken
    }

    /// Has the backend unmap the pages that it keeps mapped, before the NIC is closed: packets go the
    /// classic way then. It is done when the NIC [is settled](Self::is_settled). A backend unmaps them at the end
    /// of a session in any case.
    pub fn unstage(&mut self) {
        if let Some(control) = self.control_mut() {
            control.unstage();
        }
    }

    /// Pages that the backend keeps mapped, by its word.
    #[must_use]
    pub fn staged(&self) -> usize {
        self.control().map_or(0, Control::staged)
    }

    /// Pages that the backend did not unmap when it was asked to, by its word.
    #[must_use]
    pub fn not_unstaged(&self) -> usize {
        self.control().map_or(0, Control::not_unstaged)
    }

    /// Tells the time, counted from any moment, and never backwards. Without it a backend that does not
    /// answer is waited for without end by who waits for [`is_settled`](Self::is_settled).
    pub fn set_clock(&mut self, now: Duration) {
        if let Some(control) = self.control_mut() {
            control.set_clock(now);
        }
    }

    /// Whether nothing more is to be asked over the control ring; or the backend has left a request
    /// unanswered for [`PATIENCE`](crate::control::PATIENCE), by the [clock](Self::set_clock).
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.control().is_none_or(|control| control.is_done() || control.is_silent())
    }

    /// Whether there is something to be said through xenstore: the driver has to be stepped.
    #[must_use]
    pub fn has_news(&self) -> bool {
        let chooses = self.told.chooses != self.is_choosing();
        let room = self.told.headroom != self.headroom;
        self.connected
            && (self.offer.dynamic_multicast_control && chooses || self.offer.xdp_headroom && room)
    }

    /// [`Queue::final_check`] of every queue, and of what is under way besides packets. Wait only if it says
    /// `false`, for all [channels](Self::channels).
    ///
    /// # Errors
    /// A [`BackendFault`], now and for ever.
    pub fn final_check(&mut self) -> Result<bool, BackendFault> {
        let mut found = false;
        for queue in self.queues() {
            found |= queue.final_check()?;
        }
        let control = self.control_mut().map_or(Ok(false), Control::final_check)?;
        Ok(found || control)
    }

    /// Every event channel that wakes this NIC, while it is connected.
    pub fn channels(&self) -> impl Iterator<Item = &P::Channel> {
        let session = self.session.as_ref().filter(|_| self.connected);
        let control = session.and_then(|session| session.control.as_ref()).map(Control::channel);
        let queues = session.into_iter().flat_map(|session| &session.queues);
        queues.flat_map(Queue::channels).chain(control)
    }

    /// A new session, of which the backend knows what is asked for at its beginning.
    pub(super) fn begin(&mut self) {
        self.groups.begin();
        let headroom = if self.offer.xdp_headroom { self.headroom } else { 0 };
        // One that can be asked later is, once it knows the groups.
        let chooses = self.offer.multicast_control
            && self.chooses
            && (!self.offer.dynamic_multicast_control || self.groups.are_told());
        self.told = WrittenKeys { chooses, headroom, taken: headroom };
    }

    /// Has the control ring, and the queues, go by the steering that is wanted.
    pub(super) fn steer_queues(&mut self) {
        let Some(Session { queues, control }) = &mut self.session else { return };
        let Some(control) = control.as_mut().filter(|_| queues.len() > 1) else { return };
        let types = self.steering.as_ref().map(Steering::types).unwrap_or_default();
        queues.iter_mut().for_each(|queue| queue.take_hashes(types));
        control.steer(self.steering.clone(), queues.len());
    }

    /// Has the queues take as much room as is wanted.
    pub(super) fn expect_headroom(&mut self) {
        let Some(session) = self.session.as_mut().filter(|_| self.offer.xdp_headroom) else {
            return;
        };
        let bytes = self.headroom;
        session.queues.iter_mut().for_each(|queue| queue.take_headroom(bytes));
    }

    /// Whether the backend should send only groups that are joined: it knows all of them.
    pub(super) fn is_choosing(&self) -> bool {
        let known = self.told.chooses || self.groups.are_told();
        self.chooses && known && self.groups.refused().next().is_none()
    }

    fn control(&self) -> Option<&Control<P>> {
        self.session.as_ref()?.control.as_ref()
    }

    fn control_mut(&mut self) -> Option<&mut Control<P>> {
        self.session.as_mut()?.control.as_mut()
    }
}
