use super::{Fault, Life, only_if_lost, watch};
use crate::device::{FrontAction, FrontendMachine};
use crate::handshake::HandshakeError;
use crate::handshake::common::{
    DeviceClass, FrontendAddr, clear_error, read_backend_path, read_online, read_state, state_path,
    switch_state, write_awaiting,
};
use crate::state::XenbusState;
use crate::xenstore::{Xenstore, XsError, transaction};
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use pvio_ring::DomId;

/// Maximum number of changes of the backend's state during one [`FrontendDriver::step`] before this
/// is treated as a fault; a correct backend makes at most one.
const MOVES: u32 = 4;

/// Both sides of a device, from the frontend's view.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FrontendContext {
    /// The address of the device.
    pub addr: FrontendAddr,
    /// The frontend's directory.
    pub front: String,
    /// The backend's directory, as named in the frontend's directory; the kind of backend is not
    /// restricted.
    pub back: String,
    /// The backend's domain.
    pub back_id: DomId,
}

/// The part of a frontend that depends on the class of the device.
pub trait FrontendClass {
    /// Reads the offer and sets up rings and event channels for this backend.
    ///
    /// # Errors
    /// A [`Fault`] closes the device; all grants must have been revoked.
    fn prepare(&mut self, xs: &mut dyn Xenstore, context: &FrontendContext) -> Result<(), Fault>;

    /// Writes the request. Runs in a transaction, so it may be repeated.
    ///
    /// # Errors
    /// A [`HandshakeError`], as for [`prepare`](Self::prepare).
    fn request(
        &self,
        xs: &mut dyn Xenstore,
        context: &FrontendContext,
    ) -> Result<(), HandshakeError>;

    /// Reads the device's properties, at first and whenever they may have changed, and starts or
    /// continues.
    ///
    /// # Errors
    /// A [`Fault`] closes the device.
    fn connect(&mut self, xs: &mut dyn Xenstore, context: &FrontendContext) -> Result<(), Fault>;

    /// Writes keys that the frontend may change at any time while it is connected, without
    /// Reconfiguring. Called at every step, usually with nothing to write.
    ///
    /// # Errors
    /// A [`HandshakeError`] closes the device.
    fn write_changed_keys(
        &mut self,
        _xs: &mut dyn Xenstore,
        _context: &FrontendContext,
    ) -> Result<(), HandshakeError> {
        Ok(())
    }

    /// Returns whether a change is pending that requires Reconfiguring. Called at every step while
    /// the frontend is Connected.
    fn reconfigures(&self) -> bool {
        false
    }

    /// Writes that change. Runs in a transaction, so it may be repeated.
    ///
    /// # Errors
    /// A [`HandshakeError`] closes the device.
    fn reconfigure(
        &self,
        _xs: &mut dyn Xenstore,
        _context: &FrontendContext,
    ) -> Result<(), HandshakeError> {
        Ok(())
    }

    /// Records that the change was written; or (`taken`) that the backend reported that it applied
    /// it.
    fn reconfigured(&mut self, _taken: bool) {}

    /// Returns whether the offer no longer matches the request: another backend has started, and
    /// closed because of the mismatch. Called before the frontend follows a backend that closes and
    /// was never connected.
    fn is_outdated(&mut self, _xs: &mut dyn Xenstore, _context: &FrontendContext) -> bool {
        false
    }

    /// Ends the session. Outstanding requests are saved and submitted again if the device is prepared
    /// again. The backend may still have rings and pages mapped.
    fn disconnect(&mut self);

    /// Releases earlier sessions: according to its state, the backend has unmapped them, so their
    /// grants can be revoked. Called often, usually with nothing to release.
    fn release(&mut self);
}

/// Driver of one frontend.
#[derive(Debug)]
pub struct FrontendDriver<C> {
    class: C,
    addr: FrontendAddr,
    /// The frontend's directory.
    front: String,
    /// Known from the first step on.
    context: Option<Arc<FrontendContext>>,
    machine: FrontendMachine,
    broken: bool,
    /// According to its state, the backend has unmapped everything.
    released: bool,
}

impl<C: FrontendClass> FrontendDriver<C> {
    /// Returns a frontend that starts. Its directory names the backend. If an earlier frontend left
    /// a session, that is ended first: see [`FrontendMachine`].
    #[must_use]
    pub fn new(addr: impl Into<FrontendAddr>, class: C) -> Self {
        let addr = addr.into();
        let machine = machine_of(addr.class, XenbusState::Initialising);
        let (front, context) = (addr.path(), None);
        Self { class, addr, front, context, machine, broken: false, released: false }
    }

    /// Returns the address of the device.
    #[must_use]
    pub const fn addr(&self) -> FrontendAddr {
        self.addr
    }

    /// Returns the backend's directory, once it is known: after the first step.
    #[must_use]
    pub fn backend_path(&self) -> Option<&str> {
        self.context.as_ref().map(|context| context.back.as_str())
    }

    /// Returns the token of the watches that this driver registers: the path of the frontend.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.front
    }

    /// Returns the frontend's state. A network interface is Connected from its request on, whether
    /// or not the backend has accepted it: see [`is_connected`](Self::is_connected). Closing and
    /// Closed are also written while an earlier frontend's session is ended: see
    /// [`is_closing`](Self::is_closing).
    #[must_use]
    pub const fn state(&self) -> XenbusState {
        self.machine.state()
    }

    /// Returns whether the backend has accepted the request, and the session is active.
    #[must_use]
    pub const fn is_connected(&self) -> bool {
        self.machine.is_connected()
    }

    /// Returns whether the frontend is permanently closing or closed.
    #[must_use]
    pub const fn is_closing(&self) -> bool {
        self.machine.is_closing()
    }

    /// Returns whether the frontend is Closed and the backend has followed: nothing is shared any
    /// more. The class can be dropped, or a new driver can be created for the same device.
    #[must_use]
    pub const fn is_closed(&self) -> bool {
        self.machine.is_closed() && self.released
    }

    /// Returns the class.
    #[must_use]
    pub const fn class(&self) -> &C {
        &self.class
    }

    /// Returns the class, for use.
    pub const fn class_mut(&mut self) -> &mut C {
        &mut self.class
    }

    /// Carries out all pending work. To be called once at the start, then on every watch event with
    /// this driver's [`token`](Self::token).
    ///
    /// # Errors
    /// [`XsError`] if xenstore itself fails; the driver is unusable afterwards.
    pub fn step(&mut self, xs: &mut dyn Xenstore) -> Result<Life, XsError> {
        self.try_step(xs).or_else(|error| match error {
            HandshakeError::Xenstore(error) if error.is_connection_lost() => Err(error),
            other => {
                self.fail(xs, &other.into())?;
                Ok(Life::Alive)
            }
        })
    }

    /// Closes permanently after a protocol violation by the backend, and writes the reason to the
    /// `error` node.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn fail(&mut self, xs: &mut dyn Xenstore, fault: &Fault) -> Result<(), XsError> {
        self.broken = true;
        // Nothing that the backend does from now on is evaluated.
        self.class.disconnect();
        only_if_lost(fault.report(xs, &self.front))?;
        if self.context.is_none() {
            // The backend's path is not known: no backend has seen a state that it has to follow.
            self.machine.done(FrontAction::Close);
            self.released = true;
            return only_if_lost(switch_state(xs, &self.front, XenbusState::Closed));
        }
        self.close(xs)
    }

    /// Starts to close. The device can be released when the backend has followed: after some
    /// [`step`](Self::step), [`is_closed`](Self::is_closed) returns `true`.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn close(&mut self, xs: &mut dyn Xenstore) -> Result<(), XsError> {
        if self.machine.state() == XenbusState::Closed {
            // Closed was written for an earlier frontend, and no session was started since.
            self.machine.done(FrontAction::Close);
        } else {
            self.machine.closing();
            only_if_lost(switch_state(xs, &self.front, XenbusState::Closing))?;
        }
        Ok(())
    }

    /// Finds the backend, and the state that an earlier frontend left. `None` if the device is
    /// gone.
    fn begin(
        &mut self,
        xs: &mut dyn Xenstore,
    ) -> Result<Option<Arc<FrontendContext>>, HandshakeError> {
        if let Some(context) = self.context.clone() {
            return self.follow(xs, context).map(Some);
        }
        let (addr, front) = (self.addr, self.front.clone());
        let Some(found) = xs.read_opt(&state_path(&front))? else { return Ok(None) };
        clear_error(xs, &front)?;
        let back = read_backend_path(xs, &front)?;
        let context = FrontendContext { addr, front, back: back.path, back_id: back.domain };
        watch(xs, &backend_path(&context.front), &context.front)?;
        watch(xs, &state_path(&context.back), &context.front)?;
        let found = XenbusState::parse(Some(&found));
        self.machine = machine_of(addr.class, found);
        if found == XenbusState::Unknown {
            switch_state(xs, &context.front, XenbusState::Initialising)?;
        }
        let context = Arc::new(context);
        self.context = Some(Arc::clone(&context));
        Ok(Some(context))
    }

    /// Switches to the backend that the frontend's directory names now. The toolstack may move a
    /// device to another domain, for example if its driver domain was restarted with another
    /// number. The session with the earlier backend is then over: outstanding requests are sent to
    /// the new one.
    fn follow(
        &mut self,
        xs: &mut dyn Xenstore,
        context: Arc<FrontendContext>,
    ) -> Result<Arc<FrontendContext>, HandshakeError> {
        // If the key is missing, another value is about to be written, or the device is gone.
        let named = xs.read_opt(&backend_path(&context.front))?;
        if named.is_none_or(|path| path == context.back.as_bytes()) {
            return Ok(context);
        }
        let back = read_backend_path(xs, &context.front)?;
        let (front, addr) = (context.front.clone(), context.addr);
        let new = Arc::new(FrontendContext { addr, front, back: back.path, back_id: back.domain });
        watch(xs, &state_path(&new.back), &new.front)?;
        // Fails if the permission to read was removed with the node; a watch that is left is
        // harmless.
        let _ = xs.unwatch(&state_path(&context.back), &context.front);
        self.context = Some(Arc::clone(&new));
        if self.machine.is_requested() || self.machine.is_connected() {
            self.class.disconnect();
            switch_state(xs, &new.front, XenbusState::Initialising)?;
            self.machine.restart();
        }
        Ok(new)
    }

    fn try_step(&mut self, xs: &mut dyn Xenstore) -> Result<Life, HandshakeError> {
        if self.broken && self.context.is_none() {
            let gone = xs.read_opt(&state_path(&self.front))?.is_none();
            return Ok(if gone { Life::Gone } else { Life::Alive });
        }
        let Some(context) = self.begin(xs)? else { return Ok(Life::Gone) };
        let mut fresh = true;
        let mut moves = 0;
        loop {
            let Some(own) = xs.read_opt(&state_path(&context.front))? else {
                self.class.disconnect();
                self.class.release();
                // Fails if the watch is already gone; a watch that is left is harmless.
                let _ = xs.unwatch(&state_path(&context.back), &context.front);
                let _ = xs.unwatch(&backend_path(&context.front), &context.front);
                return Ok(Life::Gone);
            };
            if self.machine.ends_earlier()
                && XenbusState::parse(Some(&own)) == XenbusState::Initialising
            {
                // The toolstack (or QEMU's backend, when it starts) has created the device again.
                self.machine.done(FrontAction::Start);
            }
            let online = match read_online(xs, &context.back) {
                // A backend with invalid keys counts as not online; it must not delay the close.
                Err(error) if self.broken && !matches!(error, HandshakeError::Xenstore(_)) => false,
                online => online?,
            };
            let back = read_state(xs, &context.back)?;
            let mut action = self.machine.decide(back, online, fresh);
            if action == FrontAction::Close
                && online
                && !self.broken
                && self.machine.is_requested()
                && self.class.is_outdated(xs, &context)
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
                match self.perform(xs, &context, action) {
                    Ok(()) => self.machine.done(action),
                    // The backend's state changed, or its domain ended, while its keys were read.
                    // That is not a fault; its current state is evaluated instead.
                    Err(_) if moves < MOVES && read_state(xs, &context.back)? != back => {
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
                    self.class.write_changed_keys(xs, &context)?;
                }
                return Ok(Life::Alive);
            }
        }
    }

    fn perform(
        &mut self,
        xs: &mut dyn Xenstore,
        context: &FrontendContext,
        action: FrontAction,
    ) -> Result<(), Fault> {
        let Self { class, machine, .. } = self;
        let to = match action {
            FrontAction::None => return Ok(()),
            FrontAction::EndEarlier => XenbusState::Closing,
            FrontAction::FinishEarlier => XenbusState::Closed,
            FrontAction::Start => XenbusState::Initialising,
            FrontAction::WriteRequest => {
                class.prepare(xs, context)?;
                let to = machine.request_state();
                return Ok(transaction(xs, |tx| {
                    if tx.read_opt(&state_path(&context.front))?.is_none() {
                        // Do not recreate the directory of a device that the toolstack has removed.
                        return Ok(());
                    }
                    class.request(tx, context)?;
                    if to == XenbusState::Connected {
                        write_awaiting(tx, &context.front, true)?;
                    }
                    switch_state(tx, &context.front, to).map(drop)
                })?);
            }
            FrontAction::Connect => {
                class.connect(xs, context)?;
                return Ok(transaction(xs, |tx| {
                    if switch_state(tx, &context.front, XenbusState::Connected)? {
                        write_awaiting(tx, &context.front, false)?;
                    }
                    Ok::<_, HandshakeError>(())
                })?);
            }
            FrontAction::Reconfigure => {
                transaction(xs, |tx| {
                    class.reconfigure(tx, context)?;
                    switch_state(tx, &context.front, XenbusState::Reconfiguring).map(drop)
                })?;
                class.reconfigured(false);
                return Ok(());
            }
            FrontAction::Reconfigured => {
                class.reconfigured(true);
                XenbusState::Connected
            }
            FrontAction::Refresh => return class.connect(xs, context),
            FrontAction::Reconnect => {
                class.disconnect();
                XenbusState::Initialising
            }
            FrontAction::Close => {
                class.disconnect();
                XenbusState::Closed
            }
        };
        switch_state(xs, &context.front, to)?;
        Ok(())
    }
}

/// Returns the path of the key in a frontend's directory that names its backend.
fn backend_path(front: &str) -> String {
    format!("{front}/backend")
}

const fn machine_of(class: DeviceClass, found: XenbusState) -> FrontendMachine {
    match class {
        DeviceClass::Vbd => FrontendMachine::disk(found),
        DeviceClass::Vif => FrontendMachine::nic(found),
    }
}
