mod stop;
mod watches;

use super::class::{BackendClass, Prepared};
use super::{BackendContext, Fault, HotplugMode, Life, announce, only_if_lost, watch};
use crate::device::{BackAction, BackendMachine};
use crate::handshake::HandshakeError;
use crate::handshake::common::{
    DeviceAddr, clear_error, clear_revived, hotplug_path, is_revived, is_session_lost, online_path,
    read_frontend_state, read_online, state_path, switch_state, write_session_lost,
};
use crate::state::XenbusState;
use crate::xenstore::{Xenstore, XsError};

/// Maximum number of transitions in one [`step`](BackendDriver::step). The longest sequence of
/// states of a correct frontend that can go unseen has four.
pub const MOST_TRANSITIONS: u32 = 8;

/// What follows once the class has stopped serving.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum After {
    /// The session is over; the frontend may start a new one.
    Disconnect,
    /// The session failed; the frontend may start a new one.
    Fail,
    /// The device stays closed until it is removed.
    Break,
    /// The device is removed.
    Remove,
}

/// Driver of one backend.
#[derive(Debug)]
pub struct BackendDriver<C> {
    class: C,
    context: BackendContext,
    machine: BackendMachine,
    prepared: Prepared,
    /// The class has started to connect and has not finished.
    connecting: bool,
    /// The class is stopping; the value is what follows.
    stopping: Option<After>,
    /// The frontend's state as last read.
    front: XenbusState,
    /// Transitions made so far.
    transitions: u64,
    /// The hotplug script's status is watched.
    awaiting: bool,
    /// The device could not be offered: it stays closed until it is removed.
    broken: bool,
    watching: bool,
    /// The paths that the class requested are watched.
    watching_more: bool,
}

impl<C: BackendClass> BackendDriver<C> {
    /// Returns the driver of a backend that was never served.
    #[must_use]
    pub fn new(addr: DeviceAddr, class: C) -> Self {
        Self::with(addr, class, BackendMachine::new())
    }

    /// Returns the driver of a backend whose earlier process died: the frontend has to reconnect,
    /// and submits its outstanding requests again.
    #[must_use]
    pub fn restarted(addr: DeviceAddr, class: C) -> Self {
        Self::with(addr, class, BackendMachine::restarted())
    }

    /// Returns the driver of a backend whose earlier process in this domain died or exited: its
    /// session continues transparently to the frontend. See [`BackendMachine::resuming`].
    #[must_use]
    pub fn resuming(addr: DeviceAddr, class: C) -> Self {
        Self::with(addr, class, BackendMachine::resuming())
    }

    /// Returns the driver of a backend that an earlier process in this domain left in state `left`,
    /// if in-flight records persist: [resuming](Self::resuming) if that process had connected the
    /// device, [interrupted](BackendMachine::interrupted) if it had offered it, and otherwise
    /// [restarted](Self::restarted).
    #[must_use]
    pub fn taking_over(addr: DeviceAddr, class: C, left: XenbusState) -> Self {
        match left {
            // A frontend that was Reconfiguring has a session, too.
            XenbusState::Connected | XenbusState::Reconfigured => Self::resuming(addr, class),
            XenbusState::InitWait => {
                let mut driver = Self::with(addr, class, BackendMachine::interrupted());
                driver.context.interrupted = true;
                driver
            }
            // A frontend that is already Connected was served by an earlier process.
            _ => Self::restarted(addr, class),
        }
    }

    fn with(addr: DeviceAddr, class: C, machine: BackendMachine) -> Self {
        let context = BackendContext::new(addr);
        Self {
            class,
            context,
            machine,
            prepared: Prepared::Pending,
            connecting: false,
            stopping: None,
            front: XenbusState::Unknown,
            transitions: 0,
            awaiting: false,
            broken: false,
            watching: false,
            watching_more: false,
        }
    }

    /// Sets the hotplug mode; the default is [`HotplugMode::Plain`].
    #[must_use]
    pub fn with_hotplug_mode(mut self, hotplug_mode: HotplugMode) -> Self {
        self.context.hotplug_mode = hotplug_mode;
        self
    }

    /// Returns the address of the device.
    #[must_use]
    pub fn addr(&self) -> DeviceAddr {
        self.context.addr
    }

    /// Returns the token of the watches that this driver registers: the path of the backend.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.context.back
    }

    /// Returns the backend's state.
    #[must_use]
    pub fn state(&self) -> XenbusState {
        self.machine.state()
    }

    /// Returns the class.
    #[must_use]
    pub fn class(&self) -> &C {
        &self.class
    }

    /// Returns whether the driver waits for an operation of the class.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.connecting || self.stopping.is_some() || self.prepared != Prepared::Yes && !self.broken
    }

    /// Returns the number of transitions made so far: a measure of the load that the frontend
    /// causes.
    #[must_use]
    pub fn transitions(&self) -> u64 {
        self.transitions
    }

    /// Carries out pending work, at most [`MOST_TRANSITIONS`] transitions. To be called once at the
    /// start, then on every watch event with this driver's [`token`](Self::token), when the class
    /// wakes its driver, and after [`Life::More`]. It never waits for the device.
    ///
    /// # Errors
    /// [`XsError`] if the connection to xenstore is lost. Call it again with another connection, on
    /// which the watches of this driver are registered, or drop the driver.
    pub fn step(&mut self, xs: &mut dyn Xenstore) -> Result<Life, XsError> {
        self.try_step(xs).or_else(|error| match error {
            HandshakeError::Xenstore(error) if error.is_connection_lost() => Err(error),
            // The toolstack wrote invalid keys, or revoked this domain's permissions.
            other => {
                self.break_down(xs, &other.into())?;
                // If it is not finished, the class wakes its driver.
                let _ = self.finish_stopping(xs, After::Break)?;
                Ok(Life::Alive)
            }
        })
    }

    /// Applies changes that the toolstack made to a connected device.
    ///
    /// # Errors
    /// As the class's `refresh`: the previous settings stay in effect.
    pub fn refresh(&mut self, xs: &mut dyn Xenstore) -> Result<(), Fault> {
        self.class.refresh(xs, &self.context)
    }

    /// Checks whether the device's storage or interface has changed, and notifies the frontend.
    /// Also continues pending work of the class, in case the driver was not woken.
    ///
    /// # Errors
    /// As the class's `check_for_changes`.
    pub fn check_for_changes(&mut self, xs: &mut dyn Xenstore) -> Result<(), HandshakeError> {
        if let Err(fault) = self.class.proceed(xs, &self.context) {
            self.complain(xs, &fault)?;
        }
        self.class.check_for_changes(xs, &self.context)
    }

    /// Writes a fault to the `error` node of a device that continues to be served.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn complain(&self, xs: &mut dyn Xenstore, fault: &Fault) -> Result<(), XsError> {
        only_if_lost(fault.report(xs, &self.context.back))
    }

    /// Closes a device that cannot be served, until it is removed.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn refuse(&mut self, xs: &mut dyn Xenstore, fault: &Fault) -> Result<(), XsError> {
        only_if_lost(self.watch_ends(xs).map_err(HandshakeError::from))?;
        self.break_down(xs, fault)
    }

    /// Registers the watches of every device, and clears an error of an earlier process.
    fn watch_ends(&mut self, xs: &mut dyn Xenstore) -> Result<(), XsError> {
        if !self.watching {
            watch(xs, &state_path(&self.context.front), &self.context.back)?;
            watch(xs, &online_path(&self.context.back), &self.context.back)?;
            clear_error(xs, &self.context.back)?;
            self.watching = true;
        }
        Ok(())
    }

    fn try_step(&mut self, xs: &mut dyn Xenstore) -> Result<Life, HandshakeError> {
        self.watch_ends(xs)?;
        for _ in 0..MOST_TRANSITIONS {
            if let Some(after) = self.stopping {
                if self.finish_stopping(xs, after)?.is_pending() {
                    return Ok(Life::Alive);
                }
                if after == After::Remove {
                    return Ok(Life::Gone);
                }
            }
            if let Some(fault) = self.class.fault() {
                self.fail(xs, &fault)?;
                continue;
            }
            if let Some(warning) = self.class.warning() {
                self.complain(xs, &warning)?;
            }
            let action = self.decide(xs)?;
            if self.connecting && !matches!(action, BackAction::Connect | BackAction::Resume) {
                // The frontend left before it was connected.
                self.stop(After::Disconnect);
                continue;
            }
            match action {
                BackAction::None => {
                    if self.settle(xs)? {
                        return Ok(Life::Alive);
                    }
                    continue;
                }
                BackAction::Resume if !self.connecting && !self.can_resume(xs)? => continue,
                BackAction::Reconfigure if !self.class.reconfigures() => return Ok(Life::Alive),
                BackAction::Disconnect => {
                    self.stop(After::Disconnect);
                    continue;
                }
                BackAction::Remove => {
                    self.stop(After::Remove);
                    continue;
                }
                _ => {}
            }
            match self.perform(xs, action) {
                Ok(true) => {
                    self.transitions = self.transitions.wrapping_add(1);
                    self.machine.done(action);
                }
                Ok(false) => return Ok(Life::Alive),
                Err(fault) => {
                    let breaks = !matches!(
                        action,
                        BackAction::Connect
                            | BackAction::Resume
                            | BackAction::Reconfigure
                            | BackAction::Reconfigured
                    );
                    self.fail_unless_lost(xs, &fault, breaks)?;
                }
            }
        }
        Ok(Life::More)
    }

    /// Returns whether the session of the earlier process can continue; if not, it is abandoned.
    fn can_resume(&mut self, xs: &mut dyn Xenstore) -> Result<bool, HandshakeError> {
        let ignored = pvio_ring::planted!(SessionLostIgnored);
        let lost = if is_session_lost(xs, &self.context.back)? && !ignored {
            true
        } else if let Err(fault) = self.class.resumable(xs, &self.context) {
            // Without a connection, it is not known.
            xs.read_opt(&state_path(&self.context.back))?;
            !self.context.was_unserved(&fault)
        } else {
            return Ok(true);
        };
        self.machine.abandon(lost);
        Ok(false)
    }

    /// Carries out the work of a state without a transition; returns whether all of it is done.
    fn settle(&mut self, xs: &mut dyn Xenstore) -> Result<bool, HandshakeError> {
        let served = self.machine.is_connected();
        self.watch_more(xs, served)?;
        if self.broken {
            return Ok(true);
        }
        if self.prepared != Prepared::Yes
            && self.machine.state() == XenbusState::InitWait
            && let Err(fault) = self.prepare(xs)
        {
            self.fail_unless_lost(xs, &fault, true)?;
            return Ok(false);
        }
        if let Err(fault) = self.class.proceed(xs, &self.context) {
            self.complain(xs, &fault)?;
        }
        if served && let Err(error) = self.class.reread_keys(xs, &self.context) {
            if matches!(&error, HandshakeError::Xenstore(e) if e.is_connection_lost()) {
                return Err(error);
            }
            self.fail(xs, &error.into())?;
            return Ok(false);
        }
        Ok(true)
    }

    fn decide(&mut self, xs: &mut dyn Xenstore) -> Result<BackAction, HandshakeError> {
        if xs.read_opt(&state_path(&self.context.back))?.is_none() {
            return Ok(self.machine.decide_gone());
        }
        let online = read_online(xs, &self.context.back)?;
        if self.broken {
            return Ok(if online { BackAction::None } else { BackAction::Remove });
        }
        let front = read_frontend_state(xs, &self.context.front)?;
        self.front = front;
        if self.machine.is_connected()
            && matches!(front, XenbusState::Initialised | XenbusState::Connected)
            && self.class.is_superseded(xs, &self.context)
        {
            self.machine.superseded();
        }
        let action = self.machine.decide(front, online);
        if self.context.lost && !self.machine.is_stale() {
            self.class.forget_session(&self.context);
            write_session_lost(xs, &self.context.back, false)?;
            self.context.lost = false;
        }
        Ok(action)
    }

    /// Carries out an action; returns whether it is done, or has to wait.
    fn perform(&mut self, xs: &mut dyn Xenstore, action: BackAction) -> Result<bool, Fault> {
        if matches!(action, BackAction::WriteOffer | BackAction::Connect | BackAction::Resume) {
            self.context.resumed = action == BackAction::Resume;
            let may_go_on = match self.prepare(xs)? {
                Prepared::Yes => true,
                Prepared::AfterOffer => action == BackAction::WriteOffer,
                Prepared::Pending => false,
            };
            if !may_go_on {
                return Ok(false);
            }
        }
        if action == BackAction::WriteOffer {
            self.context.lost = self.machine.is_stale();
            if !self.context.lost {
                self.class.forget_session(&self.context);
            }
        }
        let begun = self.connecting;
        if matches!(action, BackAction::Connect | BackAction::Resume) {
            self.connecting = true;
        }
        let Self { class, context, connecting, .. } = self;
        let to = match action {
            BackAction::WriteOffer => {
                announce(xs, &context.back, XenbusState::InitWait, |tx| {
                    write_session_lost(tx, &context.back, context.lost)?;
                    class.offer(tx, context)
                })?;
                return Ok(true);
            }
            BackAction::Resume if is_revived(xs, &context.back)? => {
                if !begun {
                    // The predecessor's offer was removed with the directory. The frontend still
                    // depends on it.
                    class.offer(xs, context)?;
                }
                if class.connect(xs, context)?.is_pending() {
                    return Ok(false);
                }
                announce(xs, &context.back, XenbusState::Connected, |tx| {
                    clear_revived(tx, &context.back)?;
                    class.describe(tx, context)
                })?;
                *connecting = false;
                return Ok(true);
            }
            BackAction::Connect | BackAction::Resume => {
                if class.connect(xs, context)?.is_pending() {
                    return Ok(false);
                }
                if action == BackAction::Connect || context.interrupted {
                    announce(xs, &context.back, XenbusState::Connected, |tx| {
                        class.describe(tx, context)
                    })?;
                }
                *connecting = false;
                return Ok(true);
            }
            BackAction::Reconfigure => {
                class.reconfigure(xs, context)?;
                XenbusState::Reconfigured
            }
            BackAction::Reconfigured => {
                // The frontend may have started a second change before the backend saw the end of
                // the first.
                class.reconfigure(xs, context)?;
                XenbusState::Connected
            }
            BackAction::StartClosing => XenbusState::Closing,
            BackAction::Close => XenbusState::Closed,
            BackAction::None | BackAction::Disconnect | BackAction::Remove => return Ok(true),
        };
        switch_state(xs, &context.back, to)?;
        Ok(true)
    }

    fn prepare(&mut self, xs: &mut dyn Xenstore) -> Result<Prepared, Fault> {
        if self.prepared == Prepared::Yes {
            return Ok(Prepared::Yes);
        }
        if self.context.hotplug_mode == HotplugMode::Scripts && !self.awaiting {
            watch(xs, &hotplug_path(&self.context.back), &self.context.back)?;
            self.awaiting = true;
        }
        self.prepared = self.class.prepare(xs, &self.context)?;
        Ok(self.prepared)
    }
}
