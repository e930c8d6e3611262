//! Serving vifs through taps, a thread per queue: what a driver domain does.
#![forbid(unsafe_code)]

use crate::Platform;
use crate::port::knobs::{Knobs, Shares};
use crate::port::options::{NicOptions, Plug};
use crate::port::tap::{Tap, TapConfig, TapError};
use crate::port::tap_port::TapPort;
use crate::queue::{Policy, Queue};
use crate::stats::Stats;
use crate::vif::{Attach, Serve, Session};
use crate::worker::{News, Worker};
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::net::Ipv4Addr;
use pvio_uring::PrivateBuf;
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::vif::ToolstackBack;
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};

/// What the driver domain adds to what the toolstack says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TapOptions {
    /// The tap's name, if the toolstack gives none (`vifname`); else `vif<domain>.<handle>`, as
    /// Linux has it.
    pub name: Option<String>,
    /// The bridge to join, if the toolstack names none (`bridge`).
    pub bridge: Option<String>,
    /// An address of the driver domain on this link, and its prefix length.
    pub address: Option<(Ipv4Addr, u8)>,
    /// Queues that a guest may have at most; else as many as there are processors, up to
    /// [`QUEUES_DEFAULT`].
    pub max_queues: Option<u32>,
    /// How the guest's pages are reached.
    pub policy: Policy,
}

/// What all vifs of a driver domain have in common.
#[derive(Debug, Default)]
pub struct Site {
    /// What holds for a vif of which nothing else is said.
    pub defaults: NicOptions,
    /// Rates that vifs may share.
    pub shares: Shares,
}

/// Queues that a guest may have if nothing else is said: Linux' default too.
pub const QUEUES_DEFAULT: u32 = 8;

/// Serves a vif through a tap, whose carrier says whether a guest is there.
pub struct TapServer {
    options: TapOptions,
    wake: Arc<dyn Fn() + Send + Sync>,
    max_queues: u32,
    /// A handle on each queue; the first is the interface's own, and always in use.
    taps: Vec<Tap>,
    /// How many of them are in use.
    in_use: usize,
    carrier: Arc<Carrier>,
    site: Arc<Site>,
    knobs: Arc<Knobs>,
    /// What was said of the vif when it was made.
    said: NicOptions,
}

/// The carrier of the interface, which says whether somebody receives what is sent into it.
#[derive(Debug, Default)]
struct Carrier(Mutex<CarrierState>);

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
    fn change(&self, change: impl FnOnce(&mut CarrierState)) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        let on = state.guest && state.stalled == 0;
        if let Some(tap) = &state.tap
            && let Err(error) = tap.set_carrier(on)
        {
            // Older kernels cannot; the host then believes that somebody is always there.
            tracing::debug!(tap = tap.name(), %error, "carrier not set");
        }
    }
}

impl TapServer {
    /// `wake` is called by a worker that ended by itself: step the driver then.
    #[must_use]
    pub fn new(options: TapOptions, wake: Arc<dyn Fn() + Send + Sync>) -> Self {
        let processors = || std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        let max_queues = options.max_queues.unwrap_or_else(|| processors().min(QUEUES_DEFAULT));
        let carrier = Arc::default();
        let (site, knobs, said) = (Arc::default(), Arc::<Knobs>::default(), NicOptions::default());
        Self { options, wake, max_queues, taps: Vec::new(), in_use: 1, carrier, site, knobs, said }
    }

    /// The same, in a driver domain that has more to say.
    #[must_use]
    pub fn within(self, site: Arc<Site>) -> Self {
        Self { site, ..self }
    }

    /// What can be changed while the vif is served, and looked at.
    #[must_use]
    pub const fn knobs(&self) -> &Arc<Knobs> {
        &self.knobs
    }

    /// What was said of a vif, by all who may.
    fn said_of(&self, vif: &ToolstackBack) -> Result<NicOptions, Fault> {
        let (_, words) = bridge_of(vif);
        let said = self.site.defaults.clone().and(&words.replace(';', ","))?;
        Ok(said.and(vif.options.as_deref().unwrap_or_default())?)
    }

    fn apply(&self, vif: &ToolstackBack, said: &NicOptions) -> Result<(), Fault> {
        self.knobs.apply(said, vif.mac.0, vif.ip.as_deref(), &self.site.shares)
    }

    /// The tap, once there is one.
    #[must_use]
    pub fn tap(&self) -> Option<&Tap> {
        self.taps.first()
    }

    fn config(&self, vif: &ToolstackBack, attach: Attach) -> TapConfig {
        let usual = format!("vif{}.{}", vif.frontend_id, vif.handle);
        let mut config = TapConfig::new(usual);
        config.mtu = vif.mtu.unwrap_or(config.mtu);
        config.multi_queue = self.max_queues > 1;
        match attach {
            Attach::ByScript => config.up = false,
            Attach::Here => {
                let name = vif.vifname.clone().or_else(|| self.options.name.clone());
                config.name = name.unwrap_or(config.name);
                let ours = || self.said.bridge.clone().or_else(|| self.options.bridge.clone());
                config.bridge = bridge_of(vif).0.map(String::from).or_else(ours);
                config.address = self.options.address;
            }
        }
        config
    }

    fn create(&mut self, vif: &ToolstackBack, attach: Attach) -> Result<(), TapError> {
        let first = Tap::create(&self.config(vif, attach))?;
        let mut taps = Vec::from([first]);
        for _ in 1..self.max_queues {
            if let Some(first) = taps.first() {
                let queue = first.add_queue()?;
                queue.set_in_use(false)?;
                taps.push(queue);
            }
        }
        let tap = taps.first().map(Tap::try_clone).transpose()?;
        (self.taps, self.in_use) = (taps, 1);
        self.carrier.change(|carrier| *carrier = CarrierState { tap, ..CarrierState::default() });
        Ok(())
    }

    /// Lets the kernel spread packets over so many queues.
    fn use_queues(&mut self, count: usize) -> Result<(), TapError> {
        while self.in_use < count
            && let Some(tap) = self.taps.get(self.in_use)
        {
            tap.set_in_use(true)?;
            self.in_use = self.in_use.saturating_add(1);
        }
        while self.in_use > count
            && let Some(tap) = self.taps.get(self.in_use.saturating_sub(1))
        {
            tap.set_in_use(false)?;
            self.in_use = self.in_use.saturating_sub(1);
        }
        Ok(())
    }
}

impl<P> Serve<P> for TapServer
where
    P: Platform + Send + 'static,
    P::Channel: AsFd,
{
    type Buf = PrivateBuf;
    type Running = Worker;

    fn max_queues(&self) -> u32 {
        self.max_queues
    }

    fn policy(&self) -> Policy {
        self.options.policy
    }

    fn open(&mut self, vif: &ToolstackBack, attach: Attach) -> Result<(), Fault> {
        let said = self.said_of(vif)?;
        self.apply(vif, &said)?;
        if said.plug != Plug::Tap {
            return Err(Fault::new("nic-options", "only taps are there yet"));
        }
        self.said = said;
        self.create(vif, attach).map_err(fault)
    }

    fn refresh(&mut self, vif: &ToolstackBack) -> Result<(), Fault> {
        let said = self.said_of(vif)?;
        let stays = |o: &NicOptions| (o.plug.clone(), o.bridge.clone(), o.netns.clone());
        if stays(&said) != stays(&self.said) {
            let why = "where a NIC leads to stays as it is until the NIC is removed";
            return Err(Fault::new("nic-options", why));
        }
        self.apply(vif, &said)
    }

    fn begin(&mut self, session: &Session) -> Result<(), Fault> {
        self.use_queues(session.queues).map_err(fault)?;
        let tap = self.tap().ok_or_else(no_tap)?;
        tap.set_unsegmented(session.features.gso_v4, session.features.gso_v6).map_err(fault)
    }

    fn start(
        &mut self,
        index: usize,
        name: &str,
        queue: Queue<P, PrivateBuf>,
    ) -> Result<Worker, Fault> {
        let tap = self.taps.get(index).ok_or_else(no_tap)?.try_clone().map_err(fault)?;
        let (wake, carrier) = (Arc::clone(&self.wake), Arc::clone(&self.carrier));
        let tell = move |news| match news {
            News::Stalled => carrier.change(|c| c.stalled = c.stalled.saturating_add(1)),
            News::Ready => carrier.change(|c| c.stalled = c.stalled.saturating_sub(1)),
            News::Ended => wake(),
        };
        let knobs = Arc::clone(&self.knobs);
        let make = move |stats: Arc<Stats>| {
            let port = TapPort::new(tap, Arc::clone(&stats))?;
            Ok(knobs.around(port, stats, index))
        };
        Worker::start(name, queue, make, tell)
            .map_err(|e| Fault::new("worker", format!("the queue's worker cannot start: {e}")))
    }

    fn started(&mut self) {
        self.carrier.change(|carrier| carrier.guest = true);
    }

    fn stopped(&mut self) {
        self.carrier.change(|carrier| (carrier.guest, carrier.stalled) = (false, 0));
        let quiet = self.tap().map_or(Ok(()), |tap| tap.set_unsegmented(false, false));
        if let Err(error) = self.use_queues(1).and(quiet) {
            // The next session sets both anew, and says so if it cannot.
            tracing::debug!(%error, "the tap is not as before the session");
        }
    }

    fn fault(&mut self, running: &mut Worker) -> Option<Fault> {
        running.error().map(|error| Fault::new(error.code(), error))
    }
}

/// The bridge that the toolstack names, and words of ours behind it: `xl` has one field for both,
/// `bridge=NAME;WORD;WORD`.
fn bridge_of(vif: &ToolstackBack) -> (Option<&str>, &str) {
    let all = vif.bridge.as_deref().unwrap_or_default();
    let (bridge, words) = all.split_once(';').unwrap_or((all, ""));
    (Some(bridge).filter(|name| !name.is_empty()), words)
}

fn fault(error: TapError) -> Fault {
    Fault::new(error.code(), error)
}

fn no_tap() -> Fault {
    Fault::new("tap-missing", "no tap is open, or none for so many queues")
}

impl fmt::Debug for TapServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TapServer")
            .field("options", &self.options)
            .field("taps", &self.taps)
            .finish_non_exhaustive()
    }
}
