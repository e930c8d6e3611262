//! The progress of an upgrade in one supervisor.

use super::stage::{Request, Stage};
use crate::stop::Wakeup;
use pvio_runtime::Notify;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// The outcome for a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Its process is continued by this supervisor.
    Adopted,
    /// A process of this supervisor's binary serves it.
    Moved {
        /// Time from the request to stop to the moment when the new process served, in
        /// microseconds.
        pause: u64,
    },
    /// Its process could not be replaced; the reason.
    Kept(String),
    /// It was closed in the meantime.
    Closed,
}

/// The state of an upgrade, as the control socket reports it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The supervisor.
    pub pid: u32,
    /// The stage that it began with.
    pub stage: Option<Stage>,
    /// Whether it serves.
    pub serving: bool,
    /// Devices of which nothing is known yet.
    pub pending: Vec<String>,
    /// The others, in the order of their completion.
    pub devices: Vec<(String, Outcome)>,
}

/// The upgrade that a supervisor is part of, and the request for the next one.
#[derive(Debug, Clone, Default)]
pub struct Upgrade(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    stage: Option<Stage>,
    wakeup: OnceLock<Wakeup>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    request: Option<Request>,
    /// Whether the client knows that it was accepted.
    confirmed: bool,
    serving: bool,
    pending: BTreeSet<String>,
    devices: Vec<(String, Outcome)>,
    /// The device whose process is being replaced, and those that wait for it.
    turn: Option<String>,
    waiting: Vec<Notify>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut state = f.debug_struct("State");
        state.field("request", &self.request).field("pending", &self.pending);
        state.field("turn", &self.turn).finish_non_exhaustive()
    }
}

/// The replacement of the process of one device.
#[derive(Debug)]
pub enum Moving {
    /// Until it is this device's turn.
    Waiting,
    /// The process was requested to stop.
    Begun {
        /// When that was.
        since: Instant,
        /// The binary of the old process.
        old: Option<Arc<File>>,
    },
}

impl Upgrade {
    /// Returns the upgrade of a supervisor that has found the processes of these devices.
    #[must_use]
    pub fn new(stage: Option<Stage>, found: impl IntoIterator<Item = String>) -> Self {
        let state = State { pending: found.into_iter().collect(), ..State::default() };
        Self(Arc::new(Inner { stage, wakeup: OnceLock::new(), state: Mutex::new(state) }))
    }

    /// Returns whether processes of another binary are to be replaced.
    #[must_use]
    pub fn is_replacing(&self) -> bool {
        self.0.stage == Some(Stage::Replace)
    }

    /// Returns whether the devices are left as they are when the supervisor stops.
    #[must_use]
    pub fn leaves_devices(&self) -> bool {
        self.0.stage == Some(Stage::Trial) || self.request().is_some()
    }

    /// Notes that the supervisor serves. A request wakes it from now on.
    pub fn begin(&self, wakeup: &Wakeup) {
        let _ = self.0.wakeup.set(wakeup.clone());
        self.lock().serving = true;
    }

    /// Requests that the supervisor leaves its devices and starts another binary, once that is
    /// [confirmed](Self::confirm).
    ///
    /// # Errors
    /// The reason why it cannot.
    pub fn set_request(&self, request: Request) -> Result<(), &'static str> {
        let mut state = self.lock();
        if !state.serving {
            return Err("the supervisor has not started");
        }
        if state.request.is_some() || self.0.stage == Some(Stage::Trial) {
            return Err("an upgrade is in progress");
        }
        if self.is_replacing() && !state.pending.is_empty() {
            return Err("an upgrade is in progress");
        }
        state.request = Some(request);
        Ok(())
    }

    /// Lets the supervisor handle the request.
    pub fn confirm(&self) {
        self.lock().confirmed = true;
        if let Some(wakeup) = self.0.wakeup.get() {
            wakeup.wake();
        }
    }

    /// Returns the request, if one is confirmed.
    #[must_use]
    pub fn request(&self) -> Option<Request> {
        let state = self.lock();
        state.request.clone().filter(|_| state.confirmed)
    }

    /// Returns whether a device may replace its process now: one at a time does. `wake` is called
    /// when another has finished.
    #[must_use]
    pub fn take_turn(&self, device: &str, wake: &Notify) -> bool {
        let mut state = self.lock();
        if state.turn.is_some() {
            state.waiting.push(Arc::clone(wake));
            return false;
        }
        state.turn = Some(device.into());
        true
    }

    /// Records the outcome for a device.
    pub fn finish(&self, device: &str, outcome: Outcome) {
        let waiting = {
            let mut state = self.lock();
            if !state.pending.remove(device) {
                return;
            }
            state.devices.push((device.into(), outcome));
            if state.turn.as_deref() == Some(device) {
                state.turn = None;
            }
            std::mem::take(&mut state.waiting)
        };
        waiting.iter().for_each(|wake| wake());
    }

    /// Returns the state.
    #[must_use]
    pub fn status(&self) -> Status {
        let state = self.lock();
        Status {
            pid: std::process::id(),
            stage: self.0.stage.clone(),
            serving: state.serving && state.request.is_none(),
            pending: state.pending.iter().cloned().collect(),
            devices: state.devices.clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns a time in microseconds.
#[must_use]
pub fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn devices_are_moved_one_at_a_time() {
        let upgrade = Upgrade::new(Some(Stage::Replace), ["a", "b"].map(String::from));
        let woken = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&woken);
        let wake: Notify = Arc::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert!(upgrade.take_turn("a", &wake) && !upgrade.take_turn("b", &wake));
        upgrade.finish("a", Outcome::Moved { pause: 7 });
        assert_eq!(woken.load(Ordering::Relaxed), 1);
        assert!(upgrade.take_turn("b", &wake));
        assert_eq!(upgrade.status().pending, ["b"]);
    }

    #[test]
    fn second_request_is_rejected() {
        let upgrade = Upgrade::default();
        let request = Request { binary: "/x".into(), timeout: 1 };
        assert!(upgrade.set_request(request.clone()).is_err(), "it does not serve yet");
        let wakeup = Wakeup::new().unwrap();
        upgrade.begin(&wakeup);
        upgrade.set_request(request.clone()).unwrap();
        assert_eq!(upgrade.request(), None);
        upgrade.confirm();
        assert!(wakeup.take() && upgrade.leaves_devices());
        assert!(upgrade.set_request(request).is_err());
    }
}
