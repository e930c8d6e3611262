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
    /// write nothing that the earlier process has written: the frontend does not know that there was an
    /// end to it.
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
    /// That predecessor had not written Connected, so a frontend that is Initialised may have a session.
    interrupted: bool,
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
            interrupted: false,
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

    /// A backend that finds its own state InitWait, written by a predecessor in the same domain. The
    /// predecessor may have served a frontend that is Initialised or Connected, or not: this
    /// backend takes such a session over, as a [`resuming`](Self::resuming) one does, or
    /// [abandons](Self::abandon) it.
    #[must_use]
    pub const fn interrupted() -> Self {
        let mut machine = Self::resuming();
        machine.interrupted = true;
        machine
    }

    /// The session of the predecessor cannot be taken over. If it is `lost`, this is a
    /// [`restarted`](Self::restarted) backend from here on; if the predecessor had served nothing, a
    /// [`new`](Self::new) one.
    pub const fn abandon(&mut self, lost: bool) {
        self.stale |= self.resume && lost;
        self.resume = false;
    }

    /// Whether this end waits for the frontend to start over, because a session was lost.
    #[must_use]
    pub const fn is_stale(&self) -> bool {
        self.stale
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
        self.resume &= has_session || self.interrupted && front == S::Initialised;
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
            S::Initialised | S::Connected | S::Reconfiguring if self.resume && online => {
                BackAction::Resume
            }
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
mod tests;
