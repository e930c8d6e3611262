//! Stopping a session, or a backend.

use super::super::only_if_lost;
use super::{After, BackendClass, BackendDriver, Fault};
use crate::device::BackAction;
use crate::handshake::common::switch_state;
use crate::state::XenbusState;
use crate::xenstore::{Xenstore, XsError};
use core::task::Poll;

impl<C: BackendClass> BackendDriver<C> {
    /// Stops serving, closes what is open, and then writes state Closed if the directory still
    /// exists: this backend's process is about to exit. To be called until it is ready; the class
    /// wakes its driver. [`step`](Self::step) must not be called afterwards.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn shut_down(&mut self, xs: &mut dyn Xenstore) -> Result<Poll<()>, XsError> {
        if self.connecting {
            // As in `finish_stopping`.
            only_if_lost(switch_state(xs, &self.context.back, XenbusState::Closing))?;
        }
        if self.class.disconnect().is_pending() || self.class.release().is_pending() {
            return Ok(Poll::Pending);
        }
        self.machine.failed();
        only_if_lost(switch_state(xs, &self.context.back, XenbusState::Closed))?;
        Ok(Poll::Ready(()))
    }

    /// Stops as [`shut_down`](Self::shut_down) does, without writing to xenstore: another process
    /// will take the session over.
    pub fn leave(&mut self) -> Poll<()> {
        if self.class.leave().is_pending() { Poll::Pending } else { self.class.release() }
    }

    /// Ends this frontend's session after a failure; the frontend may start a new one.
    pub(super) fn fail(&mut self, xs: &mut dyn Xenstore, fault: &Fault) -> Result<(), XsError> {
        self.stop(if self.broken { After::Break } else { After::Fail });
        only_if_lost(fault.report(xs, &self.context.back))
    }

    /// Ends the session, or closes the device if it `breaks`, because an action failed. If that was
    /// because the connection is lost, the action will be repeated on the next one.
    pub(super) fn fail_unless_lost(
        &mut self,
        xs: &mut dyn Xenstore,
        fault: &Fault,
        breaks: bool,
    ) -> Result<(), XsError> {
        only_if_lost(fault.report(xs, &self.context.back))?;
        self.broken |= breaks;
        self.stop(if self.broken { After::Break } else { After::Fail });
        Ok(())
    }

    /// Closes the device until it is removed.
    pub(super) fn break_down(
        &mut self,
        xs: &mut dyn Xenstore,
        fault: &Fault,
    ) -> Result<(), XsError> {
        self.broken = true;
        self.fail(xs, fault)
    }

    /// Starts to stop; [`finish_stopping`](Self::finish_stopping) follows.
    pub(super) fn stop(&mut self, after: After) {
        self.transitions = self.transitions.wrapping_add(1);
        self.stopping = Some(after);
    }

    /// Returns whether the class has stopped, and carries out what follows.
    pub(super) fn finish_stopping(
        &mut self,
        xs: &mut dyn Xenstore,
        after: After,
    ) -> Result<Poll<()>, XsError> {
        if self.shows_closing(after) {
            // Closed is written only after all memory of the frontend was released. Closing is
            // written before the session's record is removed: a device in state InitWait without a
            // record was never served.
            only_if_lost(switch_state(xs, &self.context.back, XenbusState::Closing))?;
            self.machine.done(BackAction::StartClosing);
        }
        if self.class.disconnect().is_pending()
            || after == After::Remove && self.class.release().is_pending()
        {
            return Ok(Poll::Pending);
        }
        if after == After::Break {
            only_if_lost(switch_state(xs, &self.context.back, XenbusState::Closed))?;
        }
        (self.stopping, self.connecting) = (None, false);
        match after {
            After::Disconnect => self.machine.done(BackAction::Disconnect),
            After::Fail => self.machine.failed(),
            After::Break => {
                self.machine.failed();
                self.machine.done(BackAction::Close);
            }
            After::Remove => {
                self.unwatch(xs);
                self.machine.done(BackAction::Remove);
            }
        }
        Ok(Poll::Ready(()))
    }

    /// Returns whether Closing is written while the class stops. Not for a frontend that has
    /// restarted: it would close.
    fn shows_closing(&self, after: After) -> bool {
        use XenbusState as S;
        let goes = match after {
            After::Disconnect => matches!(self.front, S::Unknown | S::Closing | S::Closed),
            After::Fail | After::Break => !matches!(self.front, S::Initialising | S::InitWait),
            After::Remove => false,
        };
        goes && !matches!(self.machine.state(), S::Initialising | S::Closing | S::Closed)
    }
}
