use crate::state::XenbusState;

/// The next action of a frontend.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FrontAction {
    /// Do nothing until the next event.
    None,
    /// Write [`XenbusState::Closing`]: an earlier frontend of the device left its session open.
    EndEarlier,
    /// Write [`XenbusState::Closed`]: the backend closes the earlier frontend's session.
    FinishEarlier,
    /// Write [`XenbusState::Initialising`]: no session of an earlier frontend is left.
    Start,
    /// Read the offer, set up rings and event channels, write the request, then [the
    /// state](FrontendMachine::request_state) that submits it, in one transaction.
    WriteRequest,
    /// Read the device's properties (a disk's size), then write [`XenbusState::Connected`] and
    /// start.
    Connect,
    /// Read the device's properties again: they may have changed (a disk was resized).
    Refresh,
    /// Write the keys that the frontend changes while it is connected, then
    /// [`XenbusState::Reconfiguring`], in one transaction. Only network interfaces use this.
    Reconfigure,
    /// The backend has applied the change: write [`XenbusState::Connected`] again.
    Reconfigured,
    /// The backend restarted: release the rings, keep outstanding requests for resubmission, and
    /// write [`XenbusState::Initialising`].
    Reconnect,
    /// The backend is closing: finish, release the rings, and write [`XenbusState::Closed`]. A
    /// frontend in use may postpone it.
    Close,
}

/// Stage of a frontend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// An earlier frontend left this state, and possibly a session.
    Found(XenbusState),
    /// Closing is written for the earlier frontend.
    EndingEarlier,
    /// Closed is written for the earlier frontend.
    EndedEarlier,
    /// Initialising.
    Started,
    /// The request is written.
    Requested,
    Connected,
    Reconfiguring,
    Closing,
    Closed,
}

/// State machine of the frontend side of a device.
///
/// | backend state | action |
/// |---|---|
/// | InitWait (2) | request, if at the start; reconnect, if connected (or Reconfiguring) |
/// | Initialised (3) | request, if at the start |
/// | Connected (4) | end the earlier session, if at the start, see below; connect, if requested |
/// | Reconfigured (8) | connected again, if Reconfiguring; if connected, the same as Connected (4) |
/// | Closing (5) | close, if past the start or not online; otherwise end the earlier session, see below |
/// | Closed (6) | close, if past the start or not online |
/// | Initialising (1), or no state | reconnect, if requested: the backend that made the offer has died |
/// | anything else | nothing |
///
/// If connected, a new event at Connected causes a refresh, and a pending change is
/// [submitted](Self::reconfigures). Linux's netback stays in Reconfigured, so that state is treated alike.
///
/// A disk's frontend submits its request in state Initialised (3). A network interface's frontend
/// does so in Connected (4): Linux's netback and QEMU's ignore Initialised.
///
/// # An earlier frontend
/// A boot loader, an earlier kernel, or a process that was killed may have left the directory in
/// any state. Linux's disk backend and QEMU's backends react to Initialising only when they are
/// Closed themselves. So the earlier session is ended first, and the backend acknowledges each
/// step:
///
/// | found | written | until the backend is |
/// |---|---|---|
/// | anything but Initialising, Closing, Closed | Closing | Closing or Closed, or has no state |
/// | Closing | Closed | Closed, or has no state |
/// | Closed | Initialising | |
///
/// A backend that is already Closed, or has no state, has no session: Initialising is written
/// immediately. A backend that is Connected before the frontend has submitted a request has a
/// session, whatever state was found. If the device is not online (`online` is 0), the frontend
/// stays Closed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FrontendMachine {
    stage: Stage,
    requests_in: XenbusState,
}

impl FrontendMachine {
    /// Returns a disk's frontend that starts, in whose directory an earlier one left the state `found`.
    #[must_use]
    pub const fn disk(found: XenbusState) -> Self {
        Self { stage: Self::first_stage(found), requests_in: XenbusState::Initialised }
    }

    /// Returns a network interface's frontend, as [`disk`](Self::disk).
    #[must_use]
    pub const fn nic(found: XenbusState) -> Self {
        Self { stage: Self::first_stage(found), requests_in: XenbusState::Connected }
    }

    const fn first_stage(found: XenbusState) -> Stage {
        match found {
            // An invalid state is overwritten.
            XenbusState::Unknown | XenbusState::Initialising => Stage::Started,
            XenbusState::Closing => Stage::EndingEarlier,
            XenbusState::Closed => Stage::EndedEarlier,
            other => Stage::Found(other),
        }
    }

    /// Returns the state last written, by this frontend or an earlier one.
    #[must_use]
    pub const fn state(&self) -> XenbusState {
        match self.stage {
            Stage::Found(state) => state,
            Stage::EndingEarlier | Stage::Closing => XenbusState::Closing,
            Stage::EndedEarlier | Stage::Closed => XenbusState::Closed,
            Stage::Started => XenbusState::Initialising,
            Stage::Requested => self.requests_in,
            Stage::Connected => XenbusState::Connected,
            Stage::Reconfiguring => XenbusState::Reconfiguring,
        }
    }

    /// Returns the state that is written with the request.
    #[must_use]
    pub const fn request_state(&self) -> XenbusState {
        self.requests_in
    }

    /// Returns whether an earlier frontend's session still has to be ended.
    #[must_use]
    pub const fn ends_earlier(&self) -> bool {
        matches!(self.stage, Stage::Found(_) | Stage::EndingEarlier | Stage::EndedEarlier)
    }

    /// Returns whether the request is submitted, and the backend has not accepted it.
    #[must_use]
    pub const fn is_requested(&self) -> bool {
        matches!(self.stage, Stage::Requested)
    }

    /// Returns whether the backend has accepted the request, and the session is active.
    #[must_use]
    pub const fn is_connected(&self) -> bool {
        matches!(self.stage, Stage::Connected | Stage::Reconfiguring)
    }

    /// Returns whether the frontend is permanently closing or closed.
    #[must_use]
    pub const fn is_closing(&self) -> bool {
        matches!(self.stage, Stage::Closing | Stage::Closed)
    }

    /// Returns whether the frontend is permanently closed.
    #[must_use]
    pub const fn is_closed(&self) -> bool {
        matches!(self.stage, Stage::Closed)
    }

    /// Returns the next action, given the backend's state and whether the device is online. `fresh`
    /// is whether this is a new event, as opposed to another check after an action.
    #[must_use]
    pub fn decide(&self, back: XenbusState, online: bool, fresh: bool) -> FrontAction {
        use XenbusState as S;
        match (back, self.stage) {
            (S::Closed, Stage::Found(_) | Stage::EndedEarlier) if !online => FrontAction::Close,
            // A backend that is Closed, or has no state, has no session.
            (S::Closed | S::Unknown, Stage::Found(_) | Stage::EndedEarlier) => FrontAction::Start,
            // Also if there is a session that the frontend's own state does not indicate.
            (_, Stage::Found(_))
            | (S::Connected | S::Reconfiguring | S::Reconfigured, Stage::Started) => {
                FrontAction::EndEarlier
            }
            (S::Closing | S::Closed | S::Unknown, Stage::EndingEarlier) => {
                FrontAction::FinishEarlier
            }
            // The backend saw Closing late, and waits for Closed.
            (S::Closing, Stage::Started) if online => FrontAction::FinishEarlier,
            (S::InitWait | S::Initialised, Stage::Started) => FrontAction::WriteRequest,
            (S::InitWait, Stage::Connected | Stage::Reconfiguring) => FrontAction::Reconnect,
            // A request is submitted only to a backend that made an offer, so that backend has
            // died. Its rings and event channels are of no use to another.
            (S::Unknown | S::Initialising, Stage::Requested) => FrontAction::Reconnect,
            (S::Connected, Stage::Requested) => FrontAction::Connect,
            (S::Reconfigured, Stage::Reconfiguring) => FrontAction::Reconfigured,
            (S::Connected | S::Reconfigured, Stage::Connected)
            | (S::Connected, Stage::Reconfiguring)
                if fresh =>
            {
                FrontAction::Refresh
            }
            (
                S::Closing | S::Closed,
                Stage::Requested | Stage::Connected | Stage::Reconfiguring | Stage::Closing,
            ) => FrontAction::Close,
            // A frontend at the start waits for a backend that is about to offer again, but must
            // not delay the removal of its device.
            (S::Closing | S::Closed, Stage::Started) if !online => FrontAction::Close,
            _ => FrontAction::None,
        }
    }

    /// Returns whether [`FrontAction::Reconfigure`] is possible now, given the backend's state: no
    /// other transition is in progress.
    #[must_use]
    pub fn reconfigures(&self, back: XenbusState) -> bool {
        use XenbusState as S;
        self.stage == Stage::Connected && matches!(back, S::Connected | S::Reconfigured)
    }

    /// Records that an action was carried out.
    pub const fn done(&mut self, action: FrontAction) {
        self.stage = match action {
            FrontAction::None | FrontAction::Refresh => return,
            FrontAction::EndEarlier => Stage::EndingEarlier,
            FrontAction::FinishEarlier => Stage::EndedEarlier,
            FrontAction::WriteRequest => Stage::Requested,
            FrontAction::Connect | FrontAction::Reconfigured => Stage::Connected,
            FrontAction::Reconfigure => Stage::Reconfiguring,
            FrontAction::Start | FrontAction::Reconnect => Stage::Started,
            FrontAction::Close => Stage::Closed,
        };
    }

    /// Records that the frontend closes, or has failed: it wrote [`XenbusState::Closing`]. Once the
    /// backend follows, the next action is [`FrontAction::Close`].
    pub const fn closing(&mut self) {
        self.stage = Stage::Closing;
    }

    /// Records that the frontend restarts: it wrote [`XenbusState::Initialising`], after it was
    /// closed, or after a suspend invalidated its rings.
    pub const fn restart(&mut self) {
        self.stage = Stage::Started;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    use XenbusState as S;

    fn settle(m: &mut FrontendMachine, back: S, online: bool) -> Vec<FrontAction> {
        let mut done = Vec::new();
        let mut fresh = true;
        loop {
            let action = m.decide(back, online, fresh);
            if action == FrontAction::None {
                return done;
            }
            fresh = false;
            m.done(action);
            done.push(action);
            assert!(done.len() <= 3, "state machine does not settle: {done:?}");
        }
    }

    #[test]
    fn backend_that_dies_before_connecting_gets_new_request() {
        for gone in [S::Unknown, S::Initialising] {
            let mut m = FrontendMachine::disk(S::Initialising);
            assert_eq!(settle(&mut m, S::InitWait, true), [FrontAction::WriteRequest]);
            assert_eq!(settle(&mut m, gone, false), [FrontAction::Reconnect]);
            assert_eq!(settle(&mut m, S::InitWait, true), [FrontAction::WriteRequest]);
            assert_eq!(settle(&mut m, S::Connected, true), [FrontAction::Connect]);
        }
    }

    #[test]
    fn frontend_follows_backend_from_request_to_close() {
        let mut m = FrontendMachine::disk(S::Initialising);
        assert_eq!(settle(&mut m, S::Initialising, true), []);
        assert_eq!(settle(&mut m, S::InitWait, true), [FrontAction::WriteRequest]);
        assert_eq!(settle(&mut m, S::InitWait, true), [], "the backend has not seen it yet");
        assert_eq!(settle(&mut m, S::Connected, true), [FrontAction::Connect]);
        assert_eq!(settle(&mut m, S::Connected, true), [FrontAction::Refresh]);
        assert_eq!(settle(&mut m, S::Closing, false), [FrontAction::Close]);
        assert_eq!(settle(&mut m, S::Closed, false), []);
        assert_eq!(m.state(), S::Closed);
    }

    #[test]
    fn nic_writes_connected_with_request_and_waits_for_backend() {
        let mut m = FrontendMachine::nic(S::Initialising);
        assert_eq!(settle(&mut m, S::InitWait, true), [FrontAction::WriteRequest]);
        assert_eq!((m.state(), m.is_connected()), (S::Connected, false));
        assert!(!m.reconfigures(S::Connected));
        assert_eq!(settle(&mut m, S::InitWait, true), [], "the backend has not seen it yet");
        assert_eq!(settle(&mut m, S::Connected, true), [FrontAction::Connect]);
        assert_eq!((m.state(), m.is_connected()), (S::Connected, true));
        assert_eq!(settle(&mut m, S::Connected, true), [FrontAction::Refresh]);
    }

    #[test]
    fn earlier_session_is_closed_before_start() {
        for found in [S::InitWait, S::Initialised, S::Connected, S::Reconfiguring] {
            let mut m = FrontendMachine::disk(found);
            assert_eq!(m.state(), found);
            for back in [S::Initialising, S::InitWait, S::Connected] {
                let first = if m.state() == found { vec![FrontAction::EndEarlier] } else { vec![] };
                assert_eq!(settle(&mut m, back, true), first, "{found}, {back}");
            }
            assert_eq!(settle(&mut m, S::Closing, true), [FrontAction::FinishEarlier]);
            assert_eq!(settle(&mut m, S::Closing, true), []);
            assert_eq!(settle(&mut m, S::Closed, true), [FrontAction::Start]);
            assert_eq!(settle(&mut m, S::InitWait, true), [FrontAction::WriteRequest]);
        }
        for (found, back, online, does) in [
            (S::Closing, S::Connected, true, vec![]),
            (S::Closing, S::Closing, true, vec![FrontAction::FinishEarlier]),
            (S::Closed, S::Connected, true, vec![]),
            (S::Closed, S::Closed, true, vec![FrontAction::Start]),
            (S::Connected, S::Closed, true, vec![FrontAction::Start]),
            (S::Connected, S::Unknown, false, vec![FrontAction::Start]),
            (S::Connected, S::Closed, false, vec![FrontAction::Close]),
            (S::Closed, S::Closed, false, vec![FrontAction::Close]),
        ] {
            let mut m = FrontendMachine::nic(found);
            assert_eq!(settle(&mut m, back, online), does, "{found}, {back}");
        }
    }

    #[test]
    fn backend_that_restarts_gets_new_request() {
        let mut m = FrontendMachine::disk(S::Initialising);
        settle(&mut m, S::InitWait, true);
        settle(&mut m, S::Connected, true);
        let again = [FrontAction::Reconnect, FrontAction::WriteRequest];
        assert_eq!(settle(&mut m, S::InitWait, true), again);
        assert_eq!(settle(&mut m, S::Connected, true), [FrontAction::Connect]);
    }

    #[test]
    fn frontend_at_start_ends_old_session_and_follows_removal() {
        let mut m = FrontendMachine::disk(S::Initialising);
        assert_eq!(settle(&mut m, S::Closed, true), []);
        assert_eq!(settle(&mut m, S::Connected, true), [FrontAction::EndEarlier]);
        assert_eq!(settle(&mut m, S::Closing, true), [FrontAction::FinishEarlier]);
        assert_eq!(settle(&mut m, S::InitWait, true), [], "backend has not seen the new state yet");
        assert_eq!(settle(&mut m, S::Closed, true), [FrontAction::Start]);
        assert_eq!(settle(&mut m, S::Closing, false), [FrontAction::Close]);
        m.restart();
        assert_eq!(settle(&mut m, S::InitWait, true), [FrontAction::WriteRequest]);
        m.closing();
        assert_eq!(settle(&mut m, S::Connected, true), []);
        assert_eq!(settle(&mut m, S::Closing, true), [FrontAction::Close]);
    }

    #[test]
    fn reconfiguration_waits_for_backend_and_survives_its_states() {
        let connected = || {
            let mut m = FrontendMachine::disk(S::Initialising);
            settle(&mut m, S::InitWait, true);
            assert!(!m.reconfigures(S::Connected), "reconfiguration before Connected");
            settle(&mut m, S::Connected, true);
            m
        };
        let mut m = connected();
        // Linux's netback stays Reconfigured, so it is in that state at the second change.
        for back in [S::Connected, S::Reconfigured] {
            assert!(m.reconfigures(back));
            m.done(FrontAction::Reconfigure);
            assert!(!m.reconfigures(back), "second reconfiguration at the same time");
            assert_eq!(settle(&mut m, S::Connected, true), [FrontAction::Refresh]);
            assert_eq!(settle(&mut m, S::Reconfigured, true), [FrontAction::Reconfigured]);
            assert_eq!(m.state(), S::Connected);
        }
        for (back, does) in [
            (S::Closing, vec![FrontAction::Close]),
            (S::Closed, vec![FrontAction::Close]),
            (S::InitWait, vec![FrontAction::Reconnect, FrontAction::WriteRequest]),
            (S::Unknown, vec![]),
        ] {
            let mut m = connected();
            m.done(FrontAction::Reconfigure);
            assert_eq!(settle(&mut m, back, true), does, "{back}");
            assert!(!m.reconfigures(back));
        }
    }

    proptest! {
        #[test]
        fn any_state_sequence_settles(
            found in 0_u32..9,
            steps in proptest::collection::vec((0_u32..9, any::<bool>(), 0_u8..10), 0..60),
        ) {
            let mut m = FrontendMachine::nic(S::from_number(found));
            for (back, online, own) in steps {
                match own {
                    0 => m.closing(),
                    1 => m.restart(),
                    2 if m.reconfigures(S::from_number(back)) => m.done(FrontAction::Reconfigure),
                    _ => {}
                }
                settle(&mut m, S::from_number(back), online);
                prop_assert_eq!(m.decide(S::from_number(back), online, false), FrontAction::None);
            }
        }
    }
}
