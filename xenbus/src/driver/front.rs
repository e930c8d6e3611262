use super::{Ends, Fault, Life, only_if_lost, watch};
use crate::device::{FrontAction, FrontendMachine};
use crate::handshake::HandshakeError;
use crate::handshake::common::{
    DeviceAddr, clear_error, read_online, read_state, state_path, switch_state,
};
use crate::state::XenbusState;
use crate::xenstore::{Xenstore, XsError, transaction};

/// How often a backend may move on under one [`FrontendDriver::step`] before that is taken for a
/// fault; none that is honest does more than once.
const MOVES: u32 = 4;

/// What only a class of frontends knows.
pub trait FrontendClass {
    /// Reads the offer and sets up rings and event channels for this backend.
    ///
    /// # Errors
    /// A [`Fault`] closes the device; nothing stays granted.
    fn prepare(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), Fault>;

    /// Writes what this end asks for. Part of a transaction, so it may run more than once.
    ///
    /// # Errors
    /// A [`HandshakeError`], as for [`prepare`](Self::prepare).
    fn request(&self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), HandshakeError>;

    /// Reads what is served, at first and whenever it may have changed, and starts (again).
    ///
    /// # Errors
    /// A [`Fault`] closes the device.
    fn connect(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), Fault>;

    /// Writes what this end may change at any time while it is connected, other than by Reconfiguring.
    /// Called at every step, mostly with nothing to do.
    ///
    /// # Errors
    /// A [`HandshakeError`] closes the device.
    fn tell(&mut self, _xs: &mut dyn Xenstore, _ends: &Ends) -> Result<(), HandshakeError> {
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
    fn reconfigure(&self, _xs: &mut dyn Xenstore, _ends: &Ends) -> Result<(), HandshakeError> {
        Ok(())
    }

    /// That was written; or (`taken`) the backend has taken it over, by its word.
    fn reconfigured(&mut self, _taken: bool) {}

    /// Whether what is offered is not what this end asked for any more: another backend has come, and
    /// went away over it. Asked before this end follows one that closes and never connected.
    fn is_outdated(&mut self, _xs: &mut dyn Xenstore, _ends: &Ends) -> bool {
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
    ends: Ends,
    machine: FrontendMachine,
    begun: bool,
    broken: bool,
    /// The backend has let go of everything of ours, as far as it tells.
    released: bool,
}

impl<C: FrontendClass> FrontendDriver<C> {
    /// A frontend that starts.
    #[must_use]
    pub fn new(addr: DeviceAddr, class: C) -> Self {
        let (ends, machine) = (Ends::new(addr), FrontendMachine::new());
        Self { class, ends, machine, begun: false, broken: false, released: false }
    }

    /// Which device it is.
    #[must_use]
    pub fn addr(&self) -> DeviceAddr {
        self.ends.addr
    }

    /// The token of the watches this end registers: its path.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.ends.front
    }

    /// The state this end has.
    #[must_use]
    pub fn state(&self) -> XenbusState {
        self.machine.state()
    }

    /// Whether this end is Closed and the backend has followed: nothing is shared any more, and
    /// the class can be dropped, or a new driver be made for the same device.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.machine.state() == XenbusState::Closed && self.released
    }

    /// The class.
    #[must_use]
    pub fn class(&self) -> &C {
        &self.class
    }

    /// The class, to be used.
    pub fn class_mut(&mut self) -> &mut C {
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
        only_if_lost(fault.report(xs, &self.ends.front))?;
        self.close(xs)
    }

    /// Begins to close. The device is let go when the backend has followed: some
    /// [`step`](Self::step) later, [`is_closed`](Self::is_closed).
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn close(&mut self, xs: &mut dyn Xenstore) -> Result<(), XsError> {
        if self.machine.state() != XenbusState::Closed {
            self.machine.closing();
            only_if_lost(switch_state(xs, &self.ends.front, XenbusState::Closing))?;
        }
        Ok(())
    }

    fn try_step(&mut self, xs: &mut dyn Xenstore) -> Result<Life, HandshakeError> {
        if !core::mem::replace(&mut self.begun, true) {
            clear_error(xs, &self.ends.front)?;
            watch(xs, &state_path(&self.ends.back), &self.ends.front)?;
            // Whoever was here before (a boot loader, an earlier kernel): the backend lets go of
            // their rings when it sees that this end starts. The device may be gone by now.
            switch_state(xs, &self.ends.front, XenbusState::Initialising)?;
        }
        let mut fresh = true;
        let mut moves = 0;
        loop {
            if xs.read_opt(&state_path(&self.ends.front))?.is_none() {
                self.class.disconnect();
                self.class.release();
                // The watch may be gone already; what is left of it does no harm.
                let _ = xs.unwatch(&state_path(&self.ends.back), &self.ends.front);
                return Ok(Life::Gone);
            }
            let online = match read_online(xs, &self.ends.back) {
                // A backend that writes nonsense is given up by that; it must not hold up the end.
                Err(error) if self.broken && !matches!(error, HandshakeError::Xenstore(_)) => false,
                online => online?,
            };
            let back = read_state(xs, &self.ends.back)?;
            let mut action = self.machine.decide(back, online, fresh);
            if action == FrontAction::Close
                && online
                && !self.broken
                && self.machine.state() == XenbusState::Initialised
                && self.class.is_outdated(xs, &self.ends)
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
                match self.perform(xs, action) {
                    Ok(()) => self.machine.done(action),
                    // It went on, or away with its domain, while its words were read: that is no
                    // fault of theirs, and what it is now is looked at instead.
                    Err(_) if moves < MOVES && read_state(xs, &self.ends.back)? != back => {
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
                let serves = [XenbusState::Connected, XenbusState::Reconfiguring];
                if !self.broken && serves.contains(&self.machine.state()) {
                    self.class.tell(xs, &self.ends)?;
                }
                return Ok(Life::Alive);
            }
        }
    }

    fn perform(&mut self, xs: &mut dyn Xenstore, action: FrontAction) -> Result<(), Fault> {
        let Self { class, ends, .. } = self;
        let to = match action {
            FrontAction::None => return Ok(()),
            FrontAction::WriteRequest => {
                class.prepare(xs, ends)?;
                return Ok(transaction(xs, |tx| {
                    class.request(tx, ends)?;
                    switch_state(tx, &ends.front, XenbusState::Initialised).map(drop)
                })?);
            }
            FrontAction::Connect => {
                class.connect(xs, ends)?;
                XenbusState::Connected
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
