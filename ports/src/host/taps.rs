//! The taps of a vif: one interface, with a handle on each of its queues.
#![forbid(unsafe_code)]

use crate::open_vswitch;
use crate::tap::{Tap, TapConfig, TapError, inside};
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;
use pvio_uring::LogLimit;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// For how long an interface may outlive its process.
const RELEASE: Duration = Duration::from_secs(2);

/// A handle on each queue; the first is the interface's own, and always in use.
#[derive(Debug, Default)]
pub(super) struct Taps {
    all: Vec<Tap>,
    in_use: usize,
    /// The interface and the bridge it joined.
    joined: Option<(String, String)>,
}

impl Drop for Taps {
    fn drop(&mut self) {
        if let Some((tap, bridge)) = &self.joined {
            open_vswitch::leave(tap, bridge);
        }
    }
}

impl Taps {
    /// Creates the interface. A name that is in use may be that of a process that was killed: its io_uring
    /// has the tap until the kernel has released it, shortly after the process.
    pub fn create_once_free(config: &TapConfig, queues: u32) -> Result<Self, TapError> {
        let begin = Instant::now();
        loop {
            match Self::create(config, queues) {
                Err(TapError::NameInUse(_)) if begin.elapsed() < RELEASE => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                created => return created,
            }
        }
    }

    pub fn create(config: &TapConfig, queues: u32) -> Result<Self, TapError> {
        let all = within(config.netns.as_deref(), || make(Tap::create(config)?, queues))?;
        let joined = config.bridge.clone().map(|bridge| (config.name.clone(), bridge));
        Ok(Self { all, in_use: 1, joined })
    }

    /// Those of an interface that is there already.
    pub fn open(name: &str, netns: Option<&str>, queues: u32) -> Result<Self, TapError> {
        let all = within(netns, || make(Tap::open(name, queues > 1)?, queues))?;
        Ok(Self { all, in_use: 1, joined: None })
    }

    pub fn first(&self) -> Option<&Tap> {
        self.all.first()
    }

    pub fn get(&self, index: usize) -> Option<&Tap> {
        self.all.get(index)
    }

    /// Lets the kernel spread packets over so many queues.
    pub fn use_queues(&mut self, count: usize) -> Result<(), TapError> {
        while self.in_use < count
            && let Some(tap) = self.all.get(self.in_use)
        {
            tap.set_in_use(true)?;
            self.in_use = self.in_use.saturating_add(1);
        }
        while self.in_use > count
            && let Some(tap) = self.all.get(self.in_use.saturating_sub(1))
        {
            tap.set_in_use(false)?;
            self.in_use = self.in_use.saturating_sub(1);
        }
        Ok(())
    }
}

fn within<T: Send>(
    netns: Option<&str>,
    work: impl FnOnce() -> Result<T, TapError> + Send,
) -> Result<T, TapError> {
    match netns {
        None => work(),
        Some(name) => inside(name, work),
    }
}

fn make(first: Tap, queues: u32) -> Result<Vec<Tap>, TapError> {
    let mut all = Vec::from([first]);
    for _ in 1..queues {
        if let Some(first) = all.first() {
            let queue = first.add_queue()?;
            queue.set_in_use(false)?;
            all.push(queue);
        }
    }
    Ok(all)
}

/// The carrier of the interface, which says whether somebody receives what is sent into it.
#[derive(Debug, Default)]
pub(super) struct Carrier {
    state: Mutex<CarrierState>,
    /// How often it could not be set.
    failures: Arc<LogLimit>,
}

#[derive(Debug, Default)]
struct CarrierState {
    tap: Option<Tap>,
    /// A session is going on.
    guest: bool,
    /// How many of its queues have stalled. The host does not know which queue a packet would
    /// take, so one is enough (as in Linux).
    stalled: usize,
}

impl Carrier {
    pub const fn failures(&self) -> &Arc<LogLimit> {
        &self.failures
    }

    /// Of this interface, where nobody is yet.
    pub fn begin(&self, tap: Option<Tap>) {
        self.change(|carrier| *carrier = CarrierState { tap, ..CarrierState::default() });
    }

    /// A guest is there, or is not.
    pub fn guest(&self, there: bool) {
        self.change(|carrier| (carrier.guest, carrier.stalled) = (there, 0));
    }

    /// A queue has stalled, or is ready again.
    pub fn stalled(&self, one: bool) {
        self.change(|carrier| {
            let stalled = carrier.stalled;
            carrier.stalled =
                if one { stalled.saturating_add(1) } else { stalled.saturating_sub(1) };
        });
    }

    fn change(&self, change: impl FnOnce(&mut CarrierState)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        let on = state.guest && state.stalled == 0;
        if let Some(tap) = &state.tap
            && let Err(error) = tap.set_carrier(on)
            && let Some(unlogged) = self.failures.admit()
        {
            // Older kernels cannot; the host then believes that somebody is always there.
            tracing::debug!(tap = tap.name(), %error, unlogged, "carrier not set");
        }
    }
}
