//! How a session, or a backend, ends.

use super::super::only_if_lost;
use super::{After, BackendClass, BackendDriver, Fault};
use crate::device::BackAction;
use crate::handshake::common::switch_state;
use crate::state::XenbusState;
use crate::xenstore::{Xenstore, XsError};
use core::task::Poll;

impl<C: BackendClass> BackendDriver<C> {
    /// Stops serving, closes what is open, and then writes state Closed if the directory is still
    /// there: this end's process is about to end. Call it until it is ready, which the class wakes
    /// its driver for; [`step`](Self::step) is not called any more.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn shut_down(&mut self, xs: &mut dyn Xenstore) -> Result<Poll<()>, XsError> {
        if self.connecting {
            // As in `finish_stopping`.
            only_if_lost(switch_state(xs, &self.ends.back, XenbusState::Closing))?;
        }
        if self.class.disconnect().is_pending() || self.class.release().is_pending() {
            return Ok(Poll::Pending);
        }
        self.machine.failed();
        only_if_lost(switch_state(xs, &self.ends.back, XenbusState::Closed))?;
        Ok(Poll::Ready(()))
    }

    /// As [`shut_down`](Self::shut_down), and says nothing in xenstore: another process is to take
    /// the session over.
    pub fn leave(&mut self) -> Poll<()> {
        if self.class.leave().is_pending() { Poll::Pending } else { self.class.release() }
    }

    /// Ends this frontend's session; it may start anew.
    pub(super) fn fail(&mut self, xs: &mut dyn Xenstore, fault: &Fault) -> Result<(), XsError> {
        self.stop(if self.broken { After::Break } else { After::Fail });
        only_if_lost(fault.report(xs, &self.ends.back))
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

    /// Begins to stop; [`finish_stopping`](Self::finish_stopping) follows.
    pub(super) fn stop(&mut self, after: After) {
        self.transitions = self.transitions.wrapping_add(1);
        self.stopping = Some(after);
    }

    /// Whether the class has stopped, and if so what follows.
    pub(super) fn finish_stopping(
        &mut self,
        xs: &mut dyn Xenstore,
        after: After,
    ) -> Result<Poll<()>, XsError> {
        if self.shows_closing(after) {
            // Closed is written only after all that is the frontend's was released. Closing comes before
            // the session's record goes: without one, a device in state InitWait was never served.
            only_if_lost(switch_state(xs, &self.ends.back, XenbusState::Closing))?;
            self.machine.done(BackAction::StartClosing);
        }
        if self.class.disconnect().is_pending()
            || after == After::Remove && self.class.release().is_pending()
        {
            return Ok(Poll::Pending);
        }
        (self.stopping, self.connecting) = (None, false);
        match after {
            After::Disconnect => self.machine.done(BackAction::Disconnect),
            After::Fail => self.machine.failed(),
            After::Break => {
                self.machine.failed();
                only_if_lost(switch_state(xs, &self.ends.back, XenbusState::Closed))?;
                self.machine.done(BackAction::Close);
            }
            After::Remove => {
                self.unwatch(xs);
                self.machine.done(BackAction::Remove);
            }
        }
        Ok(Poll::Ready(()))
    }

    /// Whether the frontend is to see Closing while the class stops. One that has started anew is
    /// not: it would close.
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
