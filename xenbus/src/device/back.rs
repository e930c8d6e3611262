use crate::state::XenbusState;

/// The next action of a backend.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum BackAction {
    /// Do nothing until the next event.
    None,
    /// Write the offer, then [`XenbusState::InitWait`], in one transaction.
    WriteOffer,
    /// Read the frontend's request, map its rings, write the device's properties, then
    /// [`XenbusState::Connected`].
    Connect,
    /// Continue with the rings of an earlier process's session, as the frontend's keys name them.
    /// Write nothing that the earlier process has written: the frontend is not aware of the
    /// restart.
    Resume,
    /// Read the keys that the frontend changes while it is connected, then write
    /// [`XenbusState::Reconfigured`]. Only network interfaces use this.
    Reconfigure,
    /// The frontend has seen Reconfigured: read the keys again, because it may have started a
    /// second change before the backend saw the end of the first. Then write
    /// [`XenbusState::Connected`] again.
    Reconfigured,
    /// Write [`XenbusState::Closing`], and continue to serve so that the frontend can finish.
    StartClosing,
    /// Stop serving, complete the requests in flight, and release all memory of the frontend. Write
    /// no state.
    Disconnect,
    /// Write [`XenbusState::Closed`]. The backend is no longer connected.
    Close,
    /// The device was removed: drop its state.
    Remove,
}

/// State machine of the backend side of a device.
///
/// | frontend state | action |
/// |---|---|
/// | Initialising (1), InitWait (2) | disconnect if connected (the frontend restarted), then offer |
/// | Initialised (3), Connected (4) | offer if there was none, then connect, once |
/// | Closing (5) | closing, still serving |
/// | Closed (6) | disconnect, closed; removed, if not online |
/// | Reconfiguring (7) | reconfigured, if connected, until the frontend is Connected again |
/// | Reconfigured (8) | nothing |
/// | no state | offer, once, if there was never a state; else disconnect, closed; removed, if not online |
///
/// A frontend that was Connected before it is Initialised, or that
/// [requests something else](Self::superseded), has restarted (kexec, driver reload): it is
/// disconnected and connected again. When a session is taken over, Reconfiguring is treated as
/// Connected.
///
/// A device that is not online is not offered or connected again. After [`failed`](Self::failed)
/// the backend stays closed until the frontend leaves Initialised and Connected, so that a frontend
/// with invalid keys is not tried in a loop.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackendMachine {
    state: XenbusState,
    connected: bool,
    failed: bool,
    /// The frontend's state has been present.
    appeared: bool,
    /// The frontend was Connected to a previous backend, and has not given up that session.
    stale: bool,
    /// A previous backend's session is to be taken over.
    resume: bool,
    /// The previous backend had not written Connected, so an Initialised frontend may have a
    /// session.
    interrupted: bool,
    /// The frontend was Connected in this session.
    met: bool,
    /// The frontend has restarted, so this session is not with it.
    superseded: bool,
    removed: bool,
}

impl Default for BackendMachine {
    fn default() -> Self {
        Self::new()
    }
}

impl BackendMachine {
    /// Returns a backend without a session, whatever an earlier one left in its directory.
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

    /// Returns a backend that lost the session of its predecessor. It writes a new offer, and does
    /// not treat a frontend that is still Connected as a request to connect, because requests of
    /// the lost session would be lost, too. The frontend, or the toolstack for it, must reconnect.
    #[must_use]
    pub const fn restarted() -> Self {
        let mut machine = Self::new();
        machine.stale = true;
        machine
    }

    /// Returns a backend that finds its own state Connected, written by a predecessor in the same
    /// domain. It takes the session over if the frontend is still Connected, and starts a new one
    /// otherwise. See also [`abandon`](Self::abandon).
    #[must_use]
    pub const fn resuming() -> Self {
        let mut machine = Self::new();
        machine.resume = true;
        machine
    }

    /// Returns a backend that finds its own state InitWait, written by a predecessor in the same
    /// domain. If the frontend is Initialised or Connected, the predecessor may have served it. The
    /// backend takes such a session over, as a [`resuming`](Self::resuming) one does, or
    /// [abandons](Self::abandon) it.
    #[must_use]
    pub const fn interrupted() -> Self {
        let mut machine = Self::resuming();
        machine.interrupted = true;
        machine
    }

    /// Records that the predecessor's session cannot be taken over. If it is `lost`, the machine
    /// continues as a [`restarted`](Self::restarted) one; if the predecessor had served nothing, as
    /// a [`new`](Self::new) one.
    pub const fn abandon(&mut self, lost: bool) {
        self.stale |= self.resume && lost;
        self.resume = false;
    }

    /// Returns whether the backend waits for the frontend to reconnect because a session was lost.
    #[must_use]
    pub const fn is_stale(&self) -> bool {
        self.stale
    }

    /// Returns the state that the backend last wrote.
    #[must_use]
    pub const fn state(&self) -> XenbusState {
        self.state
    }

    /// Returns whether the backend uses the frontend's rings.
    #[must_use]
    pub const fn is_connected(&self) -> bool {
        self.connected
    }

    /// Returns the next action, given the frontend's current state and whether the device is
    /// online.
    #[must_use]
    pub fn decide(&mut self, front: XenbusState, online: bool) -> BackAction {
        use XenbusState as S;
        self.appeared |= front != S::Unknown;
        // A frontend that is Reconfiguring still has its session.
        let has_session = matches!(front, S::Connected | S::Reconfiguring);
        self.stale &= has_session && !pvio_ring::planted!(StaleServed);
        self.resume &= has_session || self.interrupted && front == S::Initialised;
        if self.removed {
            return BackAction::None;
        }
        // Within a session, no frontend goes from Connected back to Initialised.
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
            // Not every toolstack creates both directories in one transaction.
            S::Unknown if online && !self.appeared => self.offer(),
            // A frontend without a session does not delay the removal of its device.
            S::Closed | S::Unknown | S::Initialising | S::InitWait => self.close(online),
        }
    }

    /// Returns the next action if the backend's own directory is gone: the toolstack forced the
    /// removal.
    #[must_use]
    pub const fn decide_gone(&self) -> BackAction {
        match (self.removed, self.connected) {
            (true, _) => BackAction::None,
            (false, true) => BackAction::Disconnect,
            (false, false) => BackAction::Remove,
        }
    }

    /// Records that an action was carried out.
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

    /// Records that the session failed: [`BackAction::Connect`] failed, or a connected frontend
    /// violated the protocol. The caller must have disconnected; the next action is
    /// [`BackAction::Close`].
    pub const fn failed(&mut self) {
        self.failed = true;
        self.disconnected();
        self.resume = false;
    }

    /// Records that the frontend requests something other than it was connected to: it has
    /// restarted, and the states in between were not seen. Its new request is connected.
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
            // The toolstack removes the device: notify the frontend with state Closing.
            (true, _) if !online && self.state == S::Connected => BackAction::StartClosing,
            (true, _) => BackAction::None,
            (false, true) if self.state == S::Closed => BackAction::None,
            (false, true) => BackAction::Close,
            (false, false) if !online && self.state == S::Closed => BackAction::None,
            (false, false) if !online => BackAction::Close,
            (false, false) if self.state == S::InitWait => BackAction::Connect,
            // The frontend did not wait for an offer, or its earlier states were not seen.
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
