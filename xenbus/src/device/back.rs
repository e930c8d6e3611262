use crate::state::XenbusState;

/// What a backend should do next.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum BackAction {
    /// Nothing until the next event.
    None,
    /// Write what is offered, then [`XenbusState::InitWait`], in one transaction.
    WriteOffer,
    /// Read what the frontend asks for, map its rings, write what is served, then
    /// [`XenbusState::Connected`].
    Connect,
    /// Go on with the rings of an earlier process's session, as the frontend's keys name them, and
    /// write nothing: the frontend does not know that there was an end to it.
    Resume,
    /// Read what the frontend changes while it is connected, then [`XenbusState::Reconfigured`]. Only
    /// network interfaces do that.
    Reconfigure,
    /// The frontend has seen that: read it once more, since it may have begun a second change before this
    /// end saw the first end, then write [`XenbusState::Connected`] again.
    Reconfigured,
    /// Write [`XenbusState::Closing`], and go on serving so that the frontend can finish.
    StartClosing,
    /// Stop serving, finish what is under way, and give back all that is the frontend's. Write no
    /// state.
    Disconnect,
    /// Write [`XenbusState::Closed`]. The end is not connected any more.
    Close,
    /// The device is gone: forget it.
    Remove,
}

/// A backend's part of the device's life.
///
/// | frontend | what is done |
/// |---|---|
/// | Initialising (1), InitWait (2) | disconnect if connected (it started anew: kexec, driver reload), then offer |
/// | Initialised (3), Connected (4) | offer if that was never done, then connect, once; anew, if it was Connected before it was Initialised, or [asks for something else](Self::superseded) |
/// | Closing (5) | closing, still serving |
/// | Closed (6) | disconnect, closed; and removed, if no longer online |
/// | Reconfiguring (7) | reconfigured, if connected; until the frontend is Connected again. To one that takes over, it is Connected |
/// | Reconfigured (8) | nothing |
/// | nothing to be read | an offer, once, as long as it never was otherwise; else disconnect, closed; removed, if no longer online |
///
/// A device that is no longer online is not offered or connected again. After
/// [`failed`](Self::failed) the end stays closed until the frontend leaves Initialised and
/// Connected, so that a frontend with bad keys is not tried in a loop.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackendMachine {
    state: XenbusState,
    connected: bool,
    failed: bool,
    /// The frontend's state was there once.
    appeared: bool,
    /// The frontend was Connected to a predecessor of this end, and has not let go of it yet.
    stale: bool,
    /// The session of a predecessor is to be taken over.
    resume: bool,
    /// The frontend was Connected in this session.
    met: bool,
    /// The frontend is not the one this session is with.
    superseded: bool,
    removed: bool,
}

impl Default for BackendMachine {
    fn default() -> Self {
        Self::new()
    }
}

impl BackendMachine {
    /// A backend that has done nothing yet, whatever an earlier one left in its directory.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            state: XenbusState::Initialising,
            connected: false,
            failed: false,
            appeared: false,
            stale: false,
            resume: false,
            met: false,
            superseded: false,
            removed: false,
        }
    }

    /// A backend that lost its predecessor's session: it offers anew, and does not take a frontend
    /// that still is Connected for one that asks to be connected, since requests would be lost
    /// with the old session. The frontend, or the toolstack for it, has to start over.
    #[must_use]
    pub const fn restarted() -> Self {
        let mut machine = Self::new();
        machine.stale = true;
        machine
    }

    /// A backend that finds its own state Connected, written by a predecessor in the same domain: it
    /// takes the session over if the frontend is Connected still, and a new one if not. See also
    /// [`abandon`](Self::abandon).
    #[must_use]
    pub const fn resuming() -> Self {
        let mut machine = Self::new();
        machine.resume = true;
        machine
    }

    /// The session of the predecessor cannot be taken over: from here on this is a
    /// [`restarted`](Self::restarted) backend.
    pub const fn abandon(&mut self) {
        self.stale |= self.resume;
        self.resume = false;
    }

    /// The state this end last wrote.
    #[must_use]
    pub const fn state(&self) -> XenbusState {
        self.state
    }

    /// Whether this end holds the frontend's rings.
    #[must_use]
    pub const fn is_connected(&self) -> bool {
        self.connected
    }

    /// What to do, given the frontend's state (a new reading of it) and whether the toolstack wants the device to stay.
    #[must_use]
    pub fn decide(&mut self, front: XenbusState, online: bool) -> BackAction {
        use XenbusState as S;
        self.appeared |= front != S::Unknown;
        // One that reconfigures is connected still.
        let has_session = matches!(front, S::Connected | S::Reconfiguring);
        self.stale &= has_session;
        self.resume &= has_session;
        if self.removed {
            return BackAction::None;
        }
        // From Connected no frontend goes back to Initialised within a session.
        self.superseded |= self.connected && self.met && front == S::Initialised;
        self.met |= self.connected && front == S::Connected;
        match front {
            S::Initialised | S::Connected if self.superseded => BackAction::Disconnect,
            S::Initialising | S::InitWait if online => self.offer(),
            S::Connected | S::Reconfiguring if self.stale && online => self.offer(),
            S::Connected | S::Reconfiguring if self.resume && online => BackAction::Resume,
            S::Reconfiguring if self.stale || self.resume => self.connect(online),
            S::Initialised | S::Connected => self.connect(online),
            S::Closing => self.follow_closing(),
            S::Reconfiguring if self.connected && self.state == S::Connected => {
                BackAction::Reconfigure
            }
            S::Reconfiguring | S::Reconfigured => BackAction::None,
            // Not every toolstack writes both ends at once.
            S::Unknown if online && !self.appeared => self.offer(),
            // A frontend that has not begun does not hold up the end of its device.
            S::Closed | S::Unknown | S::Initialising | S::InitWait => self.close(online),
        }
    }

    /// What to do when the backend's own directory is gone: the toolstack has removed it by force.
    #[must_use]
    pub const fn decide_gone(&self) -> BackAction {
        match (self.removed, self.connected) {
            (true, _) => BackAction::None,
            (false, true) => BackAction::Disconnect,
            (false, false) => BackAction::Remove,
        }
    }

    /// An action was carried out.
    pub const fn done(&mut self, action: BackAction) {
        match action {
            BackAction::None => {}
            BackAction::WriteOffer => {
                self.state = XenbusState::InitWait;
                self.failed = false;
            }
            BackAction::Connect | BackAction::Resume => {
                self.state = XenbusState::Connected;
                self.connected = true;
                self.resume = false;
            }
            BackAction::Reconfigure => self.state = XenbusState::Reconfigured,
            BackAction::Reconfigured => self.state = XenbusState::Connected,
            BackAction::StartClosing => self.state = XenbusState::Closing,
            BackAction::Disconnect => self.disconnected(),
            BackAction::Close => {
                self.state = XenbusState::Closed;
                self.disconnected();
            }
            BackAction::Remove => {
                self.disconnected();
                self.removed = true;
            }
        }
    }

    /// The end cannot go on with this frontend: [`BackAction::Connect`] failed, or a connected
    /// frontend broke the rules. The caller must have disconnected; next comes
    /// [`BackAction::Close`].
    pub const fn failed(&mut self) {
        self.failed = true;
        self.disconnected();
        self.resume = false;
    }

    /// The frontend asks for something else than what it was connected to: it has started anew, and
    /// the states in between went unseen. What it asks for is taken up.
    pub const fn superseded(&mut self) {
        self.superseded = self.connected;
    }

    const fn disconnected(&mut self) {
        (self.connected, self.met, self.superseded) = (false, false, false);
    }

    fn offer(&self) -> BackAction {
        if self.connected {
            BackAction::Disconnect
        } else if self.state == XenbusState::InitWait && !self.failed {
            BackAction::None
        } else {
            BackAction::WriteOffer
        }
    }

    fn connect(&self, online: bool) -> BackAction {
        use XenbusState as S;
        match (self.connected, self.failed) {
            (true, _) if self.state == S::Reconfigured => BackAction::Reconfigured,
            // The toolstack wants it gone: ask the frontend.
            (true, _) if !online && self.state == S::Connected => BackAction::StartClosing,
            (true, _) => BackAction::None,
            (false, true) if self.state == S::Closed => BackAction::None,
            (false, true) => BackAction::Close,
            (false, false) if !online && self.state == S::Closed => BackAction::None,
            (false, false) if !online => BackAction::Close,
            (false, false) if self.state == S::InitWait => BackAction::Connect,
            // It came without waiting for an offer, or through states that were not seen.
            (false, false) => BackAction::WriteOffer,
        }
    }

    fn follow_closing(&self) -> BackAction {
        match self.state {
            XenbusState::Closing | XenbusState::Closed => BackAction::None,
            _ => BackAction::StartClosing,
        }
    }

    fn close(&self, online: bool) -> BackAction {
        if self.connected {
            BackAction::Disconnect
        } else if self.state != XenbusState::Closed {
            BackAction::Close
        } else if online {
            BackAction::None
        } else {
            BackAction::Remove
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    use XenbusState as S;

    /// Does all there is to do and returns it; panics if that does not end.
    fn settle(m: &mut BackendMachine, front: S, online: bool) -> Vec<BackAction> {
        let mut done = Vec::new();
        loop {
            let action = m.decide(front, online);
            if action == BackAction::None {
                return done;
            }
            m.done(action);
            done.push(action);
            assert!(done.len() <= 4, "no end: {done:?}");
        }
    }

    fn connected() -> BackendMachine {
        let mut m = BackendMachine::resuming();
        assert_eq!(settle(&mut m, S::Connected, true), [BackAction::Resume]);
        m
    }

    #[test]
    fn a_session_is_taken_over_only_if_the_frontend_still_has_it() {
        assert_eq!(settle(&mut connected(), S::Connected, true), []);
        let mut m = BackendMachine::resuming();
        assert_eq!(settle(&mut m, S::Initialising, true), [BackAction::WriteOffer]);
        assert_eq!(settle(&mut m, S::Connected, true), [BackAction::Connect]);
        let mut m = BackendMachine::resuming();
        assert_eq!(settle(&mut m, S::Connected, false), [BackAction::Close], "it is to go");
        let mut m = BackendMachine::resuming();
        assert_eq!(m.decide(S::Connected, true), BackAction::Resume);
        m.failed();
        assert_eq!(settle(&mut m, S::Connected, true), [BackAction::Close]);
        assert_eq!(settle(&mut m, S::Connected, true), []);
    }

    #[test]
    fn a_session_that_cannot_be_taken_over_waits_for_the_frontend_to_start_over() {
        let mut m = BackendMachine::resuming();
        assert_eq!(m.decide(S::Connected, true), BackAction::Resume);
        m.abandon();
        assert_eq!(settle(&mut m, S::Connected, true), [BackAction::WriteOffer]);
        assert_eq!(settle(&mut m, S::Connected, true), []);
        assert_eq!(settle(&mut m, S::Initialising, true), []);
        assert_eq!(settle(&mut m, S::Initialised, true), [BackAction::Connect]);
    }

    #[test]
    fn a_device_lives_and_ends() {
        let mut m = BackendMachine::new();
        assert_eq!(settle(&mut m, S::Initialising, true), [BackAction::WriteOffer]);
        assert_eq!(settle(&mut m, S::Initialised, true), [BackAction::Connect]);
        assert_eq!(settle(&mut m, S::Connected, true), []);
        assert_eq!(settle(&mut m, S::Connected, false), [BackAction::StartClosing]);
        assert!(m.is_connected(), "the frontend may still finish");
        assert_eq!(settle(&mut m, S::Closing, false), []);
        let end = [BackAction::Disconnect, BackAction::Close, BackAction::Remove];
        assert_eq!(settle(&mut m, S::Closed, false), end);
        for front in S::ALL {
            assert_eq!(settle(&mut m, front, true), []);
        }
    }

    #[test]
    fn state_three_is_optional_and_so_is_waiting_for_the_offer() {
        let mut m = BackendMachine::new();
        assert_eq!(
            settle(&mut m, S::Connected, true),
            [BackAction::WriteOffer, BackAction::Connect]
        );
    }

    #[test]
    fn a_frontend_that_starts_anew_is_offered_again() {
        // kexec, with no word of closing.
        let mut m = connected();
        let again = [BackAction::Disconnect, BackAction::WriteOffer];
        assert_eq!(settle(&mut m, S::Initialising, true), again);
        assert_eq!(settle(&mut m, S::Initialising, true), []);
        // Orderly, as a boot loader hands over: 5, 6, 1.
        assert_eq!(settle(&mut m, S::Connected, true), [BackAction::Connect]);
        assert_eq!(settle(&mut m, S::Closing, true), [BackAction::StartClosing]);
        assert_eq!(settle(&mut m, S::Closed, true), [BackAction::Disconnect, BackAction::Close]);
        assert_eq!(settle(&mut m, S::Initialising, true), [BackAction::WriteOffer]);
        // 1 while this end is still closing: the 6 was never seen.
        assert_eq!(settle(&mut m, S::Initialised, true), [BackAction::Connect]);
        assert_eq!(settle(&mut m, S::Closing, true), [BackAction::StartClosing]);
        assert_eq!(settle(&mut m, S::Initialising, true), again);
        // 1 then 3 at once, after a 6: only the 3 was seen.
        assert_eq!(settle(&mut m, S::Closed, true), [BackAction::Close]);
        assert_eq!(
            settle(&mut m, S::Initialised, true),
            [BackAction::WriteOffer, BackAction::Connect]
        );
    }

    #[test]
    fn a_frontend_whose_new_start_went_unseen_is_connected_anew() {
        let again = [BackAction::Disconnect, BackAction::WriteOffer, BackAction::Connect];
        let mut m = connected();
        assert_eq!(settle(&mut m, S::Initialised, true), again, "4, then 3 after an unseen 1");
        assert_eq!(settle(&mut m, S::Initialised, true), []);
        assert_eq!(settle(&mut m, S::Connected, true), []);
        m.superseded();
        assert_eq!(settle(&mut m, S::Connected, true), again, "4 with other keys");
        assert_eq!(settle(&mut m, S::Connected, true), []);
        m.superseded();
        let gone = [BackAction::Disconnect, BackAction::Close];
        assert_eq!(settle(&mut m, S::Initialised, false), gone, "it is to go");
        m.superseded();
        assert_eq!(settle(&mut m, S::Connected, false), [], "there is no session");
    }

    #[test]
    fn a_frontend_with_bad_keys_is_not_tried_in_a_loop() {
        let mut m = BackendMachine::new();
        settle(&mut m, S::Initialising, true);
        assert_eq!(m.decide(S::Initialised, true), BackAction::Connect);
        m.failed();
        assert_eq!(settle(&mut m, S::Initialised, true), [BackAction::Close]);
        assert_eq!(settle(&mut m, S::Connected, true), []);
        assert_eq!(settle(&mut m, S::Initialising, true), [BackAction::WriteOffer]);
        assert_eq!(settle(&mut m, S::Initialised, true), [BackAction::Connect]);
    }

    #[test]
    fn a_restarted_backend_waits_for_the_frontend_to_start_over() {
        let mut m = BackendMachine::restarted();
        assert_eq!(settle(&mut m, S::Connected, true), [BackAction::WriteOffer]);
        assert_eq!(settle(&mut m, S::Connected, true), []);
        assert_eq!(settle(&mut m, S::Initialising, true), []);
        assert_eq!(settle(&mut m, S::Connected, true), [BackAction::Connect]);
        let mut m = BackendMachine::restarted();
        let at_once = [BackAction::WriteOffer, BackAction::Connect];
        assert_eq!(settle(&mut m, S::Initialised, true), at_once, "its rings were never used");
    }

    #[test]
    fn a_frontend_reconfigures_as_often_as_it_likes() {
        let mut m = connected();
        for _ in 0..2 {
            assert_eq!(settle(&mut m, S::Reconfiguring, true), [BackAction::Reconfigure]);
            assert_eq!((m.state(), m.is_connected()), (S::Reconfigured, true));
            assert_eq!(settle(&mut m, S::Reconfiguring, true), []);
            assert_eq!(settle(&mut m, S::Connected, true), [BackAction::Reconfigured]);
            assert_eq!(m.state(), S::Connected);
        }
        settle(&mut m, S::Reconfiguring, true);
        let end = [BackAction::Reconfigured, BackAction::StartClosing];
        assert_eq!(settle(&mut m, S::Connected, false), end);
        assert_eq!(settle(&mut BackendMachine::new(), S::Reconfiguring, true), []);
    }

    #[test]
    fn a_frontend_that_reconfigures_over_a_restart_is_answered() {
        let mut m = BackendMachine::resuming();
        let over = [BackAction::Resume, BackAction::Reconfigure];
        assert_eq!(settle(&mut m, S::Reconfiguring, true), over);
        assert_eq!(settle(&mut m, S::Connected, true), [BackAction::Reconfigured]);
        let mut m = BackendMachine::restarted();
        assert_eq!(settle(&mut m, S::Reconfiguring, true), [BackAction::WriteOffer]);
        assert_eq!(settle(&mut m, S::Reconfiguring, true), []);
        assert_eq!(settle(&mut m, S::Initialising, true), []);
        assert_eq!(settle(&mut m, S::Initialised, true), [BackAction::Connect]);
        let mut m = BackendMachine::resuming();
        assert_eq!(settle(&mut m, S::Reconfiguring, false), [BackAction::Close], "it is to go");
    }

    #[test]
    fn a_frontend_that_is_not_there_yet_is_waited_for() {
        let mut m = BackendMachine::new();
        assert_eq!(settle(&mut m, S::Unknown, true), [BackAction::WriteOffer]);
        assert_eq!(settle(&mut m, S::Initialising, true), []);
        assert_eq!(settle(&mut m, S::Unknown, true), [BackAction::Close], "it went");
        let mut m = BackendMachine::new();
        assert_eq!(settle(&mut m, S::Unknown, true), [BackAction::WriteOffer]);
        let end = [BackAction::Close, BackAction::Remove];
        assert_eq!(settle(&mut m, S::Unknown, false), end, "nobody ever came");
    }

    #[test]
    fn a_device_that_is_to_go_does_not_come_back() {
        let mut m = BackendMachine::new();
        settle(&mut m, S::Initialising, true);
        assert_eq!(settle(&mut m, S::Initialised, false), [BackAction::Close]);
        assert_eq!(settle(&mut m, S::Initialising, false), [BackAction::Remove]);
    }

    #[test]
    fn a_vanished_frontend_lets_go_and_a_vanished_backend_removes() {
        let mut m = connected();
        assert_eq!(settle(&mut m, S::Unknown, true), [BackAction::Disconnect, BackAction::Close]);
        assert_eq!(settle(&mut m, S::Unknown, false), [BackAction::Remove]);
        let mut m = connected();
        assert_eq!(m.decide_gone(), BackAction::Disconnect);
        m.done(BackAction::Disconnect);
        assert_eq!(m.decide_gone(), BackAction::Remove);
        m.done(BackAction::Remove);
        assert_eq!(m.decide_gone(), BackAction::None);
    }

    proptest! {
        #[test]
        fn any_order_of_states_settles_and_repeats_do_nothing(
            steps in proptest::collection::vec((0_u32..9, any::<bool>(), 0_u8..8), 0..60)
        ) {
            let mut m = BackendMachine::new();
            for (front, online, luck) in steps {
                let front = S::from_number(front);
                match luck {
                    0 => m.failed(),
                    1 => m.superseded(),
                    _ => {}
                }
                settle(&mut m, front, online);
                prop_assert_eq!(m.decide(front, online), BackAction::None);
                prop_assert!(!(m.is_connected() && m.state() == S::Closed));
                prop_assert!(!(m.is_connected() && front == S::Closed));
            }
        }
    }
}
