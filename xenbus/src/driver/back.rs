use super::{Ends, Fault, Life, Surroundings, only_if_lost, watch};
use crate::device::{BackAction, BackendMachine};
use crate::handshake::HandshakeError;
use crate::handshake::common::{
    DeviceAddr, Hotplug, clear_error, clear_revived, hotplug_path, is_revived, online_path,
    read_frontend_state, read_hotplug, read_online, state_path, switch_state,
};
use crate::state::XenbusState;
use crate::xenstore::{Xenstore, XsError, transaction};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// Whether what a device stands on is ready.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Prepared {
    /// It is.
    Yes,
    /// The toolstack's hotplug script has to run first, which waits for the offer.
    AwaitsScript,
}

/// How far the toolstack's hotplug script for a device has come. One that has none, or whose
/// [`Surroundings`] run none, waits for nothing.
///
/// # Errors
/// A [`Fault`] with the reason the script gave.
pub fn hotplug(
    xs: &mut dyn Xenstore,
    ends: &Ends,
    script: Option<&[u8]>,
) -> Result<Prepared, Fault> {
    let Some(script) = script.filter(|_| ends.surroundings == Surroundings::Scripts) else {
        return Ok(Prepared::Yes);
    };
    match read_hotplug(xs, &ends.back)? {
        None => Ok(Prepared::AwaitsScript),
        Some(Hotplug::Connected) => Ok(Prepared::Yes),
        Some(Hotplug::Failed(why)) => {
            let script = String::from_utf8_lossy(script);
            Err(Fault::new("hotplug", format!("the hotplug script {script} failed: {why}")))
        }
    }
}

/// What only a class of backends knows.
pub trait BackendClass {
    /// Readies what the device stands on (an image, a tap), before the first offer. Called again
    /// after [`Prepared::AwaitsScript`], and not after [`Prepared::Yes`].
    ///
    /// # Errors
    /// A [`Fault`] closes the device for good: it has to be removed and made anew.
    fn prepare(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<Prepared, Fault>;

    /// Writes what the backend offers, as far as it is known before the device is prepared. Part
    /// of a transaction, so it may run more than once.
    ///
    /// # Errors
    /// A [`HandshakeError`], as for [`prepare`](Self::prepare).
    fn offer(&self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), HandshakeError>;

    /// Whether the session of an earlier process can go on. Asked before
    /// [`connect`](Self::connect) with [`Ends::resumed`].
    ///
    /// # Errors
    /// Why not: the frontend has to start over.
    fn resumable(&mut self, _xs: &mut dyn Xenstore, _ends: &Ends) -> Result<(), Fault> {
        Ok(())
    }

    /// Reads what the frontend asks for, maps its rings and begins to serve.
    ///
    /// # Errors
    /// A [`Fault`] closes the device until the frontend starts anew; nothing is served and nothing
    /// stays mapped.
    fn connect(&mut self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), Fault>;

    /// Writes what is served (a disk's size), with state Connected. Part of a transaction.
    ///
    /// # Errors
    /// A [`HandshakeError`], as for [`connect`](Self::connect).
    fn describe(&self, xs: &mut dyn Xenstore, ends: &Ends) -> Result<(), HandshakeError>;

    /// Reads again what the toolstack may change while the device is served (a vif's `rate`, a
    /// disk's limits, the medium in a drive).
    ///
    /// # Errors
    /// A [`Fault`]; what was read before stays in force, unless the next
    /// [`fault`](Self::fault) says otherwise.
    fn refresh(&mut self, _xs: &mut dyn Xenstore, _ends: &Ends) -> Result<(), Fault> {
        Ok(())
    }

    /// Paths to be watched while the device is served, besides both ends' states: what the frontend may
    /// change at any time.
    fn watches(&self, _ends: &Ends) -> Vec<String> {
        Vec::new()
    }

    /// Reads again what stands at the watched paths. Called whenever anything may have changed.
    ///
    /// # Errors
    /// A [`HandshakeError`] closes the device until the frontend starts anew.
    fn look_again(&mut self, _xs: &mut dyn Xenstore, _ends: &Ends) -> Result<(), HandshakeError> {
        Ok(())
    }

    /// Whether such devices follow a frontend through Reconfiguring; others overlook it.
    fn reconfigures(&self) -> bool {
        false
    }

    /// Reads again what the frontend changes by Reconfiguring.
    ///
    /// # Errors
    /// A [`Fault`] closes the device until the frontend starts anew.
    fn reconfigure(&mut self, _xs: &mut dyn Xenstore, _ends: &Ends) -> Result<(), Fault> {
        Ok(())
    }

    /// Looks whether what the device stands on has changed by itself (a disk's image has grown), and
    /// tells the frontend. Called now and then, and cheap.
    ///
    /// # Errors
    /// A [`HandshakeError`]: the frontend could not be told.
    fn look(&mut self, _xs: &mut dyn Xenstore, _ends: &Ends) -> Result<(), HandshakeError> {
        Ok(())
    }

    /// Whether the frontend, which is Initialised or Connected, asks for something else than what
    /// it was [connected](Self::connect) to: then it has started anew (kexec) and its states before
    /// that went unseen.
    fn is_superseded(&mut self, _xs: &mut dyn Xenstore, _ends: &Ends) -> bool {
        false
    }

    /// Finishes what is under way, stops serving, and gives back all that is the frontend's.
    /// May be called when nothing is served.
    fn disconnect(&mut self);

    /// Why serving ended by itself, if it did; told once.
    fn fault(&mut self) -> Option<Fault>;

    /// What the operator must know of a device that is served all the same; told once.
    fn warning(&mut self) -> Option<Fault> {
        None
    }
}

/// One backend.
#[derive(Debug)]
pub struct BackendDriver<C> {
    class: C,
    ends: Ends,
    machine: BackendMachine,
    prepared: bool,
    /// The script's word is watched for.
    awaiting: bool,
    /// It could not even be offered: closed until it is removed.
    broken: bool,
    watching: bool,
    /// What the class wants watched is.
    watching_more: bool,
}

impl<C: BackendClass> BackendDriver<C> {
    /// A backend that nobody has served yet.
    #[must_use]
    pub fn new(addr: DeviceAddr, class: C) -> Self {
        Self::with(addr, class, BackendMachine::new())
    }

    /// A backend whose earlier server died: the frontend is asked to start over, and replays what
    /// is unanswered.
    #[must_use]
    pub fn restarted(addr: DeviceAddr, class: C) -> Self {
        Self::with(addr, class, BackendMachine::restarted())
    }

    /// A backend whose earlier server in this domain died, or left: its session goes on without the
    /// frontend's knowing. See [`BackendMachine::resuming`].
    #[must_use]
    pub fn resuming(addr: DeviceAddr, class: C) -> Self {
        Self::with(addr, class, BackendMachine::resuming())
    }

    fn with(addr: DeviceAddr, class: C, machine: BackendMachine) -> Self {
        let ends = Ends::new(addr);
        Self {
            class,
            ends,
            machine,
            prepared: false,
            awaiting: false,
            broken: false,
            watching: false,
            watching_more: false,
        }
    }

    /// The same, with others around it than [`Surroundings::Plain`].
    #[must_use]
    pub fn within(mut self, surroundings: Surroundings) -> Self {
        self.ends.surroundings = surroundings;
        self
    }

    /// Which device it is.
    #[must_use]
    pub fn addr(&self) -> DeviceAddr {
        self.ends.addr
    }

    /// The token of the watches this end registers: its path.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.ends.back
    }

    /// The state this end has.
    #[must_use]
    pub fn state(&self) -> XenbusState {
        self.machine.state()
    }

    /// The class.
    #[must_use]
    pub fn class(&self) -> &C {
        &self.class
    }

    /// Does all there is to do now. Call it once at first, then on every watch event with this
    /// end's [`token`](Self::token), and when the class says that serving ended.
    ///
    /// # Errors
    /// [`XsError`] when xenstore itself fails; the driver is of no more use then.
    pub fn step(&mut self, xs: &mut dyn Xenstore) -> Result<Life, XsError> {
        self.try_step(xs).or_else(|error| match error {
            HandshakeError::Xenstore(error) if error.is_connection_lost() => Err(error),
            // What the toolstack wrote makes no sense, or it took our rights away.
            other => {
                self.break_down(xs, &other.into())?;
                Ok(Life::Alive)
            }
        })
    }

    /// Takes over what the toolstack changed of a device that is served.
    ///
    /// # Errors
    /// As the class' `refresh`: what was in force stays so.
    pub fn refresh(&mut self, xs: &mut dyn Xenstore) -> Result<(), Fault> {
        self.class.refresh(xs, &self.ends)
    }

    /// Looks whether what the device stands on has changed by itself, and tells the frontend.
    ///
    /// # Errors
    /// As the class' `look`.
    pub fn look(&mut self, xs: &mut dyn Xenstore) -> Result<(), HandshakeError> {
        self.class.look(xs, &self.ends)
    }

    /// Stops serving and writes state Closed if the directory is still there: this end's process
    /// is about to end.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn shut_down(&mut self, xs: &mut dyn Xenstore) -> Result<(), XsError> {
        self.class.disconnect();
        self.machine.failed();
        only_if_lost(switch_state(xs, &self.ends.back, XenbusState::Closed))
    }

    /// Tells the operator what is wrong with a device that goes on all the same.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn complain(&self, xs: &mut dyn Xenstore, fault: &Fault) -> Result<(), XsError> {
        only_if_lost(fault.report(xs, &self.ends.back))
    }

    /// Closes a device that is not to be served, until it is removed.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn refuse(&mut self, xs: &mut dyn Xenstore, fault: &Fault) -> Result<(), XsError> {
        only_if_lost(self.watch_ends(xs).map_err(HandshakeError::from))?;
        self.break_down(xs, fault)
    }

    /// Watches what every device needs watched, and forgets what an earlier server told of it.
    fn watch_ends(&mut self, xs: &mut dyn Xenstore) -> Result<(), XsError> {
        if !core::mem::replace(&mut self.watching, true) {
            watch(xs, &state_path(&self.ends.front), &self.ends.back)?;
            watch(xs, &online_path(&self.ends.back), &self.ends.back)?;
            clear_error(xs, &self.ends.back)?;
        }
        Ok(())
    }

    fn try_step(&mut self, xs: &mut dyn Xenstore) -> Result<Life, HandshakeError> {
        self.watch_ends(xs)?;
        loop {
            if let Some(fault) = self.class.fault() {
                self.fail(xs, &fault)?;
            }
            if let Some(warning) = self.class.warning() {
                self.complain(xs, &warning)?;
            }
            let action = self.decide(xs)?;
            match action {
                BackAction::None => {
                    let served = self.machine.is_connected();
                    self.watch_more(xs, served)?;
                    if served && let Err(error) = self.class.look_again(xs, &self.ends) {
                        if matches!(&error, HandshakeError::Xenstore(e) if e.is_connection_lost()) {
                            return Err(error);
                        }
                        self.fail(xs, &error.into())?;
                        continue;
                    }
                    return Ok(Life::Alive);
                }
                BackAction::Resume if self.class.resumable(xs, &self.ends).is_err() => {
                    self.machine.abandon();
                    continue;
                }
                BackAction::Reconfigure if !self.class.reconfigures() => return Ok(Life::Alive),
                BackAction::Remove => {
                    self.class.disconnect();
                    self.unwatch(xs);
                    self.machine.done(action);
                    return Ok(Life::Gone);
                }
                _ => {}
            }
            match self.perform(xs, action) {
                Ok(true) => self.machine.done(action),
                Ok(false) => return Ok(Life::Alive),
                Err(fault)
                    if matches!(
                        action,
                        BackAction::Connect
                            | BackAction::Resume
                            | BackAction::Reconfigure
                            | BackAction::Reconfigured
                    ) =>
                {
                    self.fail(xs, &fault)?;
                }
                Err(fault) => {
                    self.break_down(xs, &fault)?;
                    return Ok(Life::Alive);
                }
            }
        }
    }

    fn decide(&mut self, xs: &mut dyn Xenstore) -> Result<BackAction, HandshakeError> {
        if xs.read_opt(&state_path(&self.ends.back))?.is_none() {
            return Ok(self.machine.decide_gone());
        }
        let online = read_online(xs, &self.ends.back)?;
        if self.broken {
            return Ok(if online { BackAction::None } else { BackAction::Remove });
        }
        let front = read_frontend_state(xs, &self.ends.front)?;
        if self.machine.is_connected()
            && matches!(front, XenbusState::Initialised | XenbusState::Connected)
            && self.class.is_superseded(xs, &self.ends)
        {
            self.machine.superseded();
        }
        Ok(self.machine.decide(front, online))
    }

    /// Carries an action out; whether it is done, or waits for the toolstack.
    fn perform(&mut self, xs: &mut dyn Xenstore, action: BackAction) -> Result<bool, Fault> {
        if matches!(action, BackAction::WriteOffer | BackAction::Connect | BackAction::Resume) {
            self.ends.resumed = action == BackAction::Resume;
            self.prepare(xs)?;
        }
        let Self { class, ends, prepared, .. } = self;
        let to = match action {
            BackAction::WriteOffer => {
                announce(xs, &ends.back, XenbusState::InitWait, |tx| class.offer(tx, ends))?;
                return Ok(true);
            }
            BackAction::Connect | BackAction::Resume if !*prepared => return Ok(false),
            BackAction::Resume if is_revived(xs, &ends.back)? => {
                // What its predecessor said went with the directory. The frontend goes by it still.
                class.offer(xs, ends)?;
                class.connect(xs, ends)?;
                announce(xs, &ends.back, XenbusState::Connected, |tx| {
                    clear_revived(tx, &ends.back)?;
                    class.describe(tx, ends)
                })?;
                return Ok(true);
            }
            BackAction::Resume => return class.connect(xs, ends).map(|()| true),
            BackAction::Connect => {
                class.connect(xs, ends)?;
                announce(xs, &ends.back, XenbusState::Connected, |tx| class.describe(tx, ends))?;
                return Ok(true);
            }
            BackAction::Reconfigure => {
                class.reconfigure(xs, ends)?;
                XenbusState::Reconfigured
            }
            BackAction::Reconfigured => {
                // A second change may have begun before this end had seen the first one's end.
                class.reconfigure(xs, ends)?;
                XenbusState::Connected
            }
            BackAction::StartClosing => XenbusState::Closing,
            BackAction::Close => XenbusState::Closed,
            BackAction::Disconnect => {
                class.disconnect();
                return Ok(true);
            }
            BackAction::None | BackAction::Remove => return Ok(true),
        };
        switch_state(xs, &ends.back, to)?;
        Ok(true)
    }

    fn prepare(&mut self, xs: &mut dyn Xenstore) -> Result<(), Fault> {
        if self.prepared {
            return Ok(());
        }
        if self.ends.surroundings == Surroundings::Scripts
            && !core::mem::replace(&mut self.awaiting, true)
        {
            watch(xs, &hotplug_path(&self.ends.back), &self.ends.back)?;
        }
        self.prepared = self.class.prepare(xs, &self.ends)? == Prepared::Yes;
        Ok(())
    }

    /// Ends this frontend's session; it may start anew.
    fn fail(&mut self, xs: &mut dyn Xenstore, fault: &Fault) -> Result<(), XsError> {
        self.class.disconnect();
        self.machine.failed();
        only_if_lost(fault.report(xs, &self.ends.back))
    }

    /// Closes the device until it is removed.
    fn break_down(&mut self, xs: &mut dyn Xenstore, fault: &Fault) -> Result<(), XsError> {
        self.broken = true;
        self.fail(xs, fault)?;
        only_if_lost(switch_state(xs, &self.ends.back, XenbusState::Closed))
    }

    /// Watches what the class wants watched while the device is served, and no longer.
    fn watch_more(&mut self, xs: &mut dyn Xenstore, served: bool) -> Result<(), XsError> {
        if core::mem::replace(&mut self.watching_more, served) == served {
            return Ok(());
        }
        for path in self.class.watches(&self.ends) {
            if served {
                watch(xs, &path, &self.ends.back)?;
            } else {
                // It may be gone with the node's rights.
                let _ = xs.unwatch(&path, &self.ends.back);
            }
        }
        Ok(())
    }

    fn unwatch(&mut self, xs: &mut dyn Xenstore) {
        let _ = self.watch_more(xs, false);
        // The watches may be gone with the nodes' rights; what is left of them does no harm.
        let _ = xs.unwatch(&state_path(&self.ends.front), &self.ends.back);
        let _ = xs.unwatch(&online_path(&self.ends.back), &self.ends.back);
        if self.awaiting {
            let _ = xs.unwatch(&hotplug_path(&self.ends.back), &self.ends.back);
        }
    }
}

/// Writes what the class has to say, and a state, in one transaction: all of it, or nothing where
/// the directory is gone, lest a device the toolstack has removed come back as a ghost.
fn announce(
    xs: &mut dyn Xenstore,
    base: &str,
    state: XenbusState,
    words: impl Fn(&mut dyn Xenstore) -> Result<(), HandshakeError>,
) -> Result<(), HandshakeError> {
    transaction(xs, |tx| {
        if tx.read_opt(&state_path(base))?.is_some() {
            words(tx)?;
            switch_state(tx, base, state)?;
        }
        Ok(())
    })
}
