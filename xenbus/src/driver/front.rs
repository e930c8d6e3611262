use super::{Fault, Life, only_if_lost, watch};
use crate::device::{FrontAction, FrontendMachine};
use crate::handshake::HandshakeError;
use crate::handshake::common::{
    DeviceClass, FrontendAddr, clear_error, read_backend_end, read_online, read_state, state_path,
    switch_state, write_awaiting,
};
use crate::state::XenbusState;
use crate::xenstore::{Xenstore, XsError, transaction};
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use pvio_ring::DomId;

/// How often a backend may move on under one [`FrontendDriver::step`] before that is taken for a
/// fault; none that is honest does more than once.
const MOVES: u32 = 4;

/// The two ends of a device, as its frontend finds them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FrontendEnds {
    /// Which device it is.
    pub addr: FrontendAddr,
    /// The frontend's directory.
    pub front: String,
    /// The backend's directory, as the frontend's names it: of whatever kind the backend is.
    pub back: String,
    /// The backend's domain.
    pub back_id: DomId,
}

/// What only a class of frontends knows.
pub trait FrontendClass {
    /// Reads the offer and sets up rings and event channels for this backend.
    ///
    /// # Errors
    /// A [`Fault`] closes the device; nothing stays granted.
    fn prepare(&mut self, xs: &mut dyn Xenstore, ends: &FrontendEnds) -> Result<(), Fault>;

    /// Writes what this end asks for. Part of a transaction, so it may run more than once.
    ///
    /// # Errors
    /// A [`HandshakeError`], as for [`prepare`](Self::prepare).
    fn request(&self, xs: &mut dyn Xenstore, ends: &FrontendEnds) -> Result<(), HandshakeError>;

    /// Reads what is served, at first and whenever it may have changed, and starts (again).
    ///
    /// # Errors
    /// A [`Fault`] closes the device.
    fn connect(&mut self, xs: &mut dyn Xenstore, ends: &FrontendEnds) -> Result<(), Fault>;

    /// Writes what this end may change at any time while it is connected, other than by Reconfiguring.
    /// Called at every step, mostly with nothing to do.
    ///
    /// # Errors
    /// A [`HandshakeError`] closes the device.
    fn tell(&mut self, _xs: &mut dyn Xenstore, _ends: &FrontendEnds) -> Result<(), HandshakeError> {
        Ok(())
    }

    /// Whether something is to be changed that the backend takes over when this end is Reconfiguring.
    /// Asked at every step while it is Connected.
    fn reconfigures(&self) -> bool {
        false
    }

    /// Writes that. Part of a transaction, so it may run more than once.
    ///
    /// # Errors
    /// A [`HandshakeError`] closes the device.
    fn reconfigure(
        &self,
        _xs: &mut dyn Xenstore,
        _ends: &FrontendEnds,
    ) -> Result<(), HandshakeError> {
        Ok(())
    }

    /// That was written; or (`taken`) the backend has taken it over, by its word.
    fn reconfigured(&mut self, _taken: bool) {}

    /// Whether what is offered is not what this end asked for any more: another backend has come, and
    /// went away over it. Asked before this end follows one that closes and never connected.
    fn is_outdated(&mut self, _xs: &mut dyn Xenstore, _ends: &FrontendEnds) -> bool {
        false
    }

    /// The session is over. What is unanswered is kept, to be sent again if the device is prepared
    /// again. The backend may have rings and pages mapped still.
    fn disconnect(&mut self);

    /// The backend has let go of earlier sessions, as far as it tells: their grants can be taken
    /// back. Called often, mostly with nothing to do.
    fn release(&mut self);
}

/// One frontend.
#[derive(Debug)]
pub struct FrontendDriver<C> {
    class: C,
    addr: FrontendAddr,
    /// The frontend's directory.
    front: String,
    /// Known from the first step on.
    ends: Option<Arc<FrontendEnds>>,
    machine: FrontendMachine,
    broken: bool,
    /// The backend has let go of everything of ours, as far as it tells.
    released: bool,
}

impl<C: FrontendClass> FrontendDriver<C> {
    /// Returns a frontend that starts. Its directory says where the backend is. If an earlier
    /// frontend left a session behind, that is ended first: see [`FrontendMachine`].
    #[must_use]
    pub fn new(addr: impl Into<FrontendAddr>, class: C) -> Self {
        let addr = addr.into();
        let machine = machine_of(addr.class, XenbusState::Initialising);
        let (front, ends) = (addr.path(), None);
        Self { class, addr, front, ends, machine, broken: false, released: false }
    }

    /// Which device it is.
    #[must_use]
    pub const fn addr(&self) -> FrontendAddr {
        self.addr
    }

    /// Returns the backend's directory, once it is known: after the first step.
    #[must_use]
    pub fn backend_path(&self) -> Option<&str> {
        self.ends.as_ref().map(|ends| ends.back.as_str())
    }

    /// The token of the watches this end registers: its path.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.front
    }

    /// The state this end has. A network interface is Connected from its request on, whether or not
    /// the backend has accepted it: see [`is_connected`](Self::is_connected). Closing and Closed are
    /// also written while an earlier frontend's session is ended: see [`is_closing`](Self::is_closing).
    #[must_use]
    pub const fn state(&self) -> XenbusState {
        self.machine.state()
    }

    /// Whether the backend has accepted the request, and the session goes on.
    #[must_use]
    pub const fn is_connected(&self) -> bool {
        self.machine.is_connected()
    }

    /// Whether this end closes, or is closed, for good.
    #[must_use]
    pub const fn is_closing(&self) -> bool {
        self.machine.is_closing()
    }

    /// Whether this end is Closed and the backend has followed: nothing is shared any more, and
    /// the class can be dropped, or a new driver be made for the same device.
    #[must_use]
    pub const fn is_closed(&self) -> bool {
        self.machine.is_closed() && self.released
    }

    /// The class.
    #[must_use]
    pub const fn class(&self) -> &C {
        &self.class
    }

    /// The class, to be used.
    pub const fn class_mut(&mut self) -> &mut C {
        &mut self.class
    }

    /// Does all there is to do now. Call it once at first, then on every watch event with this
    /// end's [`token`](Self::token).
    ///
    /// # Errors
    /// [`XsError`] when xenstore itself fails; the driver is of no more use then.
    pub fn step(&mut self, xs: &mut dyn Xenstore) -> Result<Life, XsError> {
        self.try_step(xs).or_else(|error| match error {
            HandshakeError::Xenstore(error) if error.is_connection_lost() => Err(error),
            other => {
                self.fail(xs, &other.into())?;
                Ok(Life::Alive)
            }
        })
    }

    /// The backend broke the rules: tells why in the `error` node, and closes for good.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn fail(&mut self, xs: &mut dyn Xenstore, fault: &Fault) -> Result<(), XsError> {
        self.broken = true;
        // Whatever the backend has still to say is not listened to.
        self.class.disconnect();
        only_if_lost(fault.report(xs, &self.front))?;
        if self.ends.is_none() {
            // Where the backend is was not found out: it has seen nothing that it had to follow.
            self.machine.done(FrontAction::Close);
            self.released = true;
            return only_if_lost(switch_state(xs, &self.front, XenbusState::Closed));
        }
        self.close(xs)
    }

    /// Begins to close. The device is let go when the backend has followed: some
    /// [`step`](Self::step) later, [`is_closed`](Self::is_closed).
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn close(&mut self, xs: &mut dyn Xenstore) -> Result<(), XsError> {
        if self.machine.state() == XenbusState::Closed {
            // Nothing was begun after an earlier frontend.
            self.machine.done(FrontAction::Close);
        } else {
            self.machine.closing();
            only_if_lost(switch_state(xs, &self.front, XenbusState::Closing))?;
        }
        Ok(())
    }

    /// Finds the backend, and what an earlier frontend left. None if the device is gone.
    fn begin(
        &mut self,
        xs: &mut dyn Xenstore,
    ) -> Result<Option<Arc<FrontendEnds>>, HandshakeError> {
        if let Some(ends) = self.ends.clone() {
            return self.follow(xs, ends).map(Some);
        }
        let (addr, front) = (self.addr, self.front.clone());
        let Some(found) = xs.read_opt(&state_path(&front))? else { return Ok(None) };
        clear_error(xs, &front)?;
        let back = read_backend_end(xs, &front)?;
        let ends = FrontendEnds { addr, front, back: back.path, back_id: back.domain };
        watch(xs, &backend_path(&ends.front), &ends.front)?;
        watch(xs, &state_path(&ends.back), &ends.front)?;
        let found = XenbusState::parse(Some(&found));
        self.machine = machine_of(addr.class, found);
        if found == XenbusState::Unknown {
            switch_state(xs, &ends.front, XenbusState::Initialising)?;
        }
        let ends = Arc::new(ends);
        self.ends = Some(Arc::clone(&ends));
        Ok(Some(ends))
    }

    /// Goes on with the backend that the frontend's directory names now. The toolstack may give a device to
    /// another domain, if its driver domain came back under another number say. The session with the
    /// earlier backend is over then: what is unanswered is sent to the new one.
    fn follow(
        &mut self,
        xs: &mut dyn Xenstore,
        ends: Arc<FrontendEnds>,
    ) -> Result<Arc<FrontendEnds>, HandshakeError> {
        // Where there is none, another is about to be written, or the device is gone.
        let named = xs.read_opt(&backend_path(&ends.front))?;
        if named.is_none_or(|path| path == ends.back.as_bytes()) {
            return Ok(ends);
        }
        let back = read_backend_end(xs, &ends.front)?;
        let (front, addr) = (ends.front.clone(), ends.addr);
        let new = Arc::new(FrontendEnds { addr, front, back: back.path, back_id: back.domain });
        watch(xs, &state_path(&new.back), &new.front)?;
        // It may be gone with the right to read there; what is left of it does no harm.
        let _ = xs.unwatch(&state_path(&ends.back), &ends.front);
        self.ends = Some(Arc::clone(&new));
        if self.machine.is_requested() || self.machine.is_connected() {
            self.class.disconnect();
            switch_state(xs, &new.front, XenbusState::Initialising)?;
            self.machine.restart();
        }
        Ok(new)
    }

    fn try_step(&mut self, xs: &mut dyn Xenstore) -> Result<Life, HandshakeError> {
        if self.broken && self.ends.is_none() {
            let gone = xs.read_opt(&state_path(&self.front))?.is_none();
            return Ok(if gone { Life::Gone } else { Life::Alive });
        }
        let Some(ends) = self.begin(xs)? else { return Ok(Life::Gone) };
        let mut fresh = true;
        let mut moves = 0;
        loop {
            let Some(own) = xs.read_opt(&state_path(&ends.front))? else {
                self.class.disconnect();
                self.class.release();
                // The watch may be gone already; what is left of it does no harm.
                let _ = xs.unwatch(&state_path(&ends.back), &ends.front);
                let _ = xs.unwatch(&backend_path(&ends.front), &ends.front);
                return Ok(Life::Gone);
            };
            if self.machine.ends_earlier()
                && XenbusState::parse(Some(&own)) == XenbusState::Initialising
            {
                // The toolstack (QEMU's backends, when they begin) made the device anew meanwhile.
                self.machine.done(FrontAction::Start);
            }
            let online = match read_online(xs, &ends.back) {
                // A backend that writes nonsense is given up by that; it must not hold up the end.
                Err(error) if self.broken && !matches!(error, HandshakeError::Xenstore(_)) => false,
                online => online?,
            };
            let back = read_state(xs, &ends.back)?;
            let mut action = self.machine.decide(back, online, fresh);
            if action == FrontAction::Close
                && online
                && !self.broken
                && self.machine.is_requested()
                && self.class.is_outdated(xs, &ends)
            {
                action = FrontAction::Reconnect;
            }
            if action == FrontAction::None
                && !self.broken
                && self.machine.reconfigures(back)
                && self.class.reconfigures()
            {
                action = FrontAction::Reconfigure;
            }
            fresh = false;
            let idle = action == FrontAction::None || (self.broken && action != FrontAction::Close);
            if !idle {
                match self.perform(xs, &ends, action) {
                    Ok(()) => self.machine.done(action),
                    // It went on, or away with its domain, while its words were read: that is no
                    // fault of theirs, and what it is now is looked at instead.
                    Err(_) if moves < MOVES && read_state(xs, &ends.back)? != back => {
                        moves = moves.saturating_add(1);
                        continue;
                    }
                    Err(fault) => self.fail(xs, &fault)?,
                }
            }
            self.released = !matches!(
                back,
                XenbusState::Connected
                    | XenbusState::Closing
                    | XenbusState::Reconfiguring
                    | XenbusState::Reconfigured
            );
            if self.released {
                self.class.release();
            }
            if idle {
                if !self.broken && self.machine.is_connected() {
                    self.class.tell(xs, &ends)?;
                }
                return Ok(Life::Alive);
            }
        }
    }

    fn perform(
        &mut self,
        xs: &mut dyn Xenstore,
        ends: &FrontendEnds,
        action: FrontAction,
    ) -> Result<(), Fault> {
        let Self { class, machine, .. } = self;
        let to = match action {
            FrontAction::None => return Ok(()),
            FrontAction::EndEarlier => XenbusState::Closing,
            FrontAction::FinishEarlier => XenbusState::Closed,
            FrontAction::Start => XenbusState::Initialising,
            FrontAction::WriteRequest => {
                class.prepare(xs, ends)?;
                let to = machine.request_state();
                return Ok(transaction(xs, |tx| {
                    if tx.read_opt(&state_path(&ends.front))?.is_none() {
                        // No ghost of a device that the toolstack has removed.
                        return Ok(());
                    }
                    class.request(tx, ends)?;
                    if to == XenbusState::Connected {
                        write_awaiting(tx, &ends.front, true)?;
                    }
                    switch_state(tx, &ends.front, to).map(drop)
                })?);
            }
            FrontAction::Connect => {
                class.connect(xs, ends)?;
                return Ok(transaction(xs, |tx| {
                    if switch_state(tx, &ends.front, XenbusState::Connected)? {
                        write_awaiting(tx, &ends.front, false)?;
                    }
                    Ok::<_, HandshakeError>(())
                })?);
            }
            FrontAction::Reconfigure => {
                transaction(xs, |tx| {
                    class.reconfigure(tx, ends)?;
                    switch_state(tx, &ends.front, XenbusState::Reconfiguring).map(drop)
                })?;
                class.reconfigured(false);
                return Ok(());
            }
            FrontAction::Reconfigured => {
                class.reconfigured(true);
                XenbusState::Connected
            }
            FrontAction::Refresh => return class.connect(xs, ends),
            FrontAction::Reconnect => {
                class.disconnect();
                XenbusState::Initialising
            }
            FrontAction::Close => {
                class.disconnect();
                XenbusState::Closed
            }
        };
        switch_state(xs, &ends.front, to)?;
        Ok(())
    }
}

/// Where a frontend's directory says where its backend is.
fn backend_path(front: &str) -> String {
    format!("{front}/backend")
}

const fn machine_of(class: DeviceClass, found: XenbusState) -> FrontendMachine {
    match class {
        DeviceClass::Vbd => FrontendMachine::disk(found),
        DeviceClass::Vif => FrontendMachine::nic(found),
    }
}
