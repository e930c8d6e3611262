use crate::state::XenbusState;

/// What a frontend should do next.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FrontAction {
    /// Nothing until the next event.
    None,
    /// Read the offer, set up rings and event channels, write the request, then
    /// [`XenbusState::Initialised`], in one transaction.
    WriteRequest,
    /// Read what is served (a disk's size), then write [`XenbusState::Connected`] and start.
    Connect,
    /// Read what is served again: it may have changed (a disk was resized), or not.
    Refresh,
    /// Write what this end changes while it is connected, then [`XenbusState::Reconfiguring`], in one
    /// transaction. Only network interfaces do that.
    Reconfigure,
    /// The backend has taken that over: write [`XenbusState::Connected`] again.
    Reconfigured,
    /// The backend started anew: give up the rings, keep what is unanswered to be sent again, and
    /// write [`XenbusState::Initialising`].
    Reconnect,
    /// The backend wants to close: finish, give up the rings, and write
    /// [`XenbusState::Closed`]. A frontend in use may leave it undone for a while.
    Close,
}

/// A frontend's part of the device's life.
///
/// | backend | what is done |
/// |---|---|
/// | InitWait (2) | request, if at the start; reconnect, if connected (or Reconfiguring) |
/// | Initialised (3) | request, if at the start |
/// | Connected (4) | connect, if requested; refresh, if connected and the event is new; [reconfigure](Self::reconfigures), if this end wants to |
/// | Reconfigured (8) | connected again, if Reconfiguring; if connected, as Connected: Linux's netback stays so |
/// | Closing (5) | close, if begun; if the device is to go, in any case |
/// | Closed (6) | the same |
/// | Initialising (1), or nothing to be read | reconnect, if requested: whoever made the offer has died |
/// | anything else | nothing |
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FrontendMachine {
    state: XenbusState,
}

impl Default for FrontendMachine {
    fn default() -> Self {
        Self::new()
    }
}

impl FrontendMachine {
    /// A frontend that starts. If its directory holds any state but [`XenbusState::Initialising`]
    /// (a boot loader was here, a kernel before this one), write that first: the backend then
    /// lets go of the old rings and offers anew.
    #[must_use]
    pub const fn new() -> Self {
        Self { state: XenbusState::Initialising }
    }

    /// The state this end last wrote.
    #[must_use]
    pub const fn state(&self) -> XenbusState {
        self.state
    }

    /// What to do, given the backend's state and whether its device is to stay. `fresh` tells a
    /// new event from a second look after an action.
    #[must_use]
    pub fn decide(&self, back: XenbusState, online: bool, fresh: bool) -> FrontAction {
        use XenbusState as S;
        match (back, self.state) {
            (S::InitWait | S::Initialised, S::Initialising) => FrontAction::WriteRequest,
            (S::InitWait, S::Connected | S::Reconfiguring) => FrontAction::Reconnect,
            // This end asks only whom made an offer, so that one has died since, and what was set
            // up for it is of no use to another.
            (S::Unknown | S::Initialising, S::Initialised) => FrontAction::Reconnect,
            (S::Connected, S::Initialised) => FrontAction::Connect,
            (S::Reconfigured, S::Reconfiguring) => FrontAction::Reconfigured,
            (S::Connected | S::Reconfigured, S::Connected) | (S::Connected, S::Reconfiguring)
                if fresh =>
            {
                FrontAction::Refresh
            }
            (
                S::Closing | S::Closed,
                S::Initialised | S::Connected | S::Reconfiguring | S::Closing,
            ) => FrontAction::Close,
            // A frontend at the start waits for a backend that is about to offer anew, but must
            // not hold up the end of its device.
            (S::Closing | S::Closed, S::Initialising) if !online => FrontAction::Close,
            _ => FrontAction::None,
        }
    }

    /// Whether [`FrontAction::Reconfigure`] can be done now, given the backend's state: nothing else is
    /// under way.
    #[must_use]
    pub fn reconfigures(&self, back: XenbusState) -> bool {
        use XenbusState as S;
        self.state == S::Connected && matches!(back, S::Connected | S::Reconfigured)
    }

    /// An action was carried out.
    pub const fn done(&mut self, action: FrontAction) {
        match action {
            FrontAction::None | FrontAction::Refresh => {}
            FrontAction::WriteRequest => self.state = XenbusState::Initialised,
            FrontAction::Connect | FrontAction::Reconfigured => {
                self.state = XenbusState::Connected;
            }
            FrontAction::Reconfigure => self.state = XenbusState::Reconfiguring,
            FrontAction::Reconnect => self.state = XenbusState::Initialising,
            FrontAction::Close => self.state = XenbusState::Closed,
        }
    }

    /// This end wants to close, or cannot go on: it wrote [`XenbusState::Closing`]. Once the
    /// backend follows, [`FrontAction::Close`] comes.
    pub const fn closing(&mut self) {
        self.state = XenbusState::Closing;
    }

    /// This end starts over: it wrote [`XenbusState::Initialising`], after it was closed, or
    /// after a suspend took its rings away.
    pub const fn restart(&mut self) {
        self.state = XenbusState::Initialising;
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
            assert!(done.len() <= 3, "no end: {done:?}");
        }
    }

    #[test]
    fn a_backend_that_dies_before_it_connects_is_asked_anew() {
        for gone in [S::Unknown, S::Initialising] {
            let mut m = FrontendMachine::new();
            assert_eq!(settle(&mut m, S::InitWait, true), [FrontAction::WriteRequest]);
            assert_eq!(settle(&mut m, gone, false), [FrontAction::Reconnect]);
            assert_eq!(settle(&mut m, S::InitWait, true), [FrontAction::WriteRequest]);
            assert_eq!(settle(&mut m, S::Connected, true), [FrontAction::Connect]);
        }
    }

    #[test]
    fn a_frontend_lives_and_ends() {
        let mut m = FrontendMachine::new();
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
    fn a_backend_that_starts_anew_is_asked_again() {
        let mut m = FrontendMachine::new();
        settle(&mut m, S::InitWait, true);
        settle(&mut m, S::Connected, true);
        let again = [FrontAction::Reconnect, FrontAction::WriteRequest];
        assert_eq!(settle(&mut m, S::InitWait, true), again);
        assert_eq!(settle(&mut m, S::Connected, true), [FrontAction::Connect]);
    }

    #[test]
    fn at_the_start_an_old_session_is_waited_out_but_a_removal_is_not() {
        let mut m = FrontendMachine::new();
        for old in [S::Connected, S::Closing, S::Closed] {
            assert_eq!(settle(&mut m, old, true), []);
        }
        assert_eq!(settle(&mut m, S::Closing, false), [FrontAction::Close]);
        m.restart();
        assert_eq!(settle(&mut m, S::InitWait, true), [FrontAction::WriteRequest]);
        m.closing();
        assert_eq!(settle(&mut m, S::Connected, true), []);
        assert_eq!(settle(&mut m, S::Closing, true), [FrontAction::Close]);
    }

    #[test]
    fn a_change_while_connected_is_told_and_waited_for_whatever_the_backend_does() {
        let connected = || {
            let mut m = FrontendMachine::new();
            settle(&mut m, S::InitWait, true);
            assert!(!m.reconfigures(S::Connected), "not yet");
            settle(&mut m, S::Connected, true);
            m
        };
        let mut m = connected();
        // Linux's netback stays Reconfigured, so that the second finds it so.
        for back in [S::Connected, S::Reconfigured] {
            assert!(m.reconfigures(back));
            m.done(FrontAction::Reconfigure);
            assert!(!m.reconfigures(back), "one at a time");
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
        fn any_order_of_states_settles(steps in proptest::collection::vec((0_u32..9, any::<bool>(), 0_u8..10), 0..60)) {
            let mut m = FrontendMachine::new();
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
