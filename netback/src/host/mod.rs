//! Serving vifs through taps, a thread per queue: what a driver domain does.
#![forbid(unsafe_code)]

mod other;
mod taps;

use crate::Platform;
use crate::port::knobs::{Knobs, Shares};
use crate::port::options::{NicOptions, Plug};
use crate::port::switch::Switches;
use crate::port::tap::{Tap, TapConfig, TapError};
use crate::port::tap_port::TapPort;
use crate::queue::{Policy, Queue, Waker};
use crate::stats::Stats;
use crate::vif::{Attach, Serve, Session};
use crate::worker::{News, Worker};
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::net::Ipv4Addr;
use other::Other;
use pvio_recordfile::{RecordDir, RecordFile};
use pvio_uring::PrivateBuf;
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::vif::ToolstackBack;
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use taps::{Carrier, Taps};

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
    /// Switches that vifs may be plugged into.
    pub switches: Switches,
}

/// Queues that a guest may have if nothing else is said: Linux' default too.
pub const QUEUES_DEFAULT: u32 = 8;

/// Serves a vif through a tap, whose carrier says whether a guest is there, or through whatever
/// else [its options](NicOptions) say.
pub struct TapServer {
    options: TapOptions,
    wake: Arc<dyn Fn() + Send + Sync>,
    max_queues: u32,
    taps: Taps,
    carrier: Arc<Carrier>,
    /// Where the vif leads to, if not to a tap.
    other: Option<Other>,
    site: Arc<Site>,
    knobs: Arc<Knobs>,
    /// What was said of the vif when it was made.
    said: NicOptions,
    /// What the queues of the session wake each other by, if it has a control ring.
    mail: Vec<OwnedFd>,
    records: Option<RecordDir>,
}

impl TapServer {
    /// `wake` is called by a worker that ended by itself: step the driver then.
    #[must_use]
    pub fn new(options: TapOptions, wake: Arc<dyn Fn() + Send + Sync>) -> Self {
        let processors = || std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        let max_queues = options.max_queues.unwrap_or_else(|| processors().min(QUEUES_DEFAULT));
        let carrier = Arc::default();
        let (site, knobs, said) = (Arc::default(), Arc::<Knobs>::default(), NicOptions::default());
        Self {
            options,
            wake,
            max_queues,
            taps: Taps::default(),
            carrier,
            other: None,
            site,
            knobs,
            said,
            mail: Vec::new(),
            records: None,
        }
    }

    /// The same, in a driver domain that has more to say.
    #[must_use]
    pub fn within(self, site: Arc<Site>) -> Self {
        Self { site, ..self }
    }

    /// The same, whose sessions another process can take over: it finds their in-flight records in the
    /// same directory.
    #[must_use]
    pub fn recorded_in(self, records: RecordDir) -> Self {
        Self { records: Some(records), ..self }
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
        config.netns.clone_from(&self.said.netns);
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
        self.taps = match &self.said.plug {
            Plug::Opened(name) => Taps::open(name, self.said.netns.as_deref(), self.max_queues)?,
            _ => Taps::create(&self.config(vif, attach), self.max_queues)?,
        };
        self.carrier.begin(self.taps.first().map(Tap::try_clone).transpose()?);
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
    type Record = RecordFile;

    fn record(&mut self, device: &str, len: usize, resumed: bool) -> Result<RecordFile, Fault> {
        let failed =
            |e: io::Error| Fault::new("record-file", format!("in-flight record {device}: {e}"));
        match &self.records {
            Some(dir) if resumed => dir.existing(device, len).map_err(failed),
            Some(dir) => dir.create(device, len).map_err(failed),
            None if resumed => {
                Err(Fault::new("record-missing", "no in-flight records are kept here"))
            }
            None => RecordFile::private(len).map_err(failed),
        }
    }

    fn remove_record(&mut self, device: &str) {
        if let Some(Err(error)) = self.records.as_ref().map(|dir| dir.remove(device)) {
            tracing::warn!(device, %error, "the in-flight record is not removed");
        }
    }

    fn max_queues(&self) -> u32 {
        let theirs = self.other.as_ref().and_then(Other::queues);
        theirs.map_or(self.max_queues, |queues| queues.min(self.max_queues))
    }

    fn policy(&self) -> Policy {
        self.options.policy
    }

    fn wakers(&mut self, queues: usize) -> Result<Vec<Waker>, Fault> {
        self.mail.clear();
        let mut wakers = Vec::with_capacity(queues);
        for _ in 0..queues {
            let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
            let no_mail =
                |e: io::Error| Fault::new("worker", format!("no eventfd for a queue: {e}"));
            let mail = eventfd(0, flags).map_err(|e| no_mail(e.into()))?;
            let other = mail.try_clone().map_err(no_mail)?;
            let wake = move || {
                // It can only be that it is set already.
                let _ = rustix::io::write(&other, &1_u64.to_ne_bytes());
            };
            self.mail.push(mail);
            wakers.push(Arc::new(wake) as Waker);
        }
        Ok(wakers)
    }

    fn open(&mut self, vif: &ToolstackBack, attach: Attach) -> Result<(), Fault> {
        let said = self.said_of(vif)?;
        self.apply(vif, &said)?;
        let name = format!("vif{}.{}", vif.frontend_id, vif.handle);
        self.other = Other::open(&said, &name, &self.site, self.max_queues)?;
        self.said = said;
        if self.other.is_none() { self.create(vif, attach).map_err(fault) } else { Ok(()) }
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
        if let Some(other) = &mut self.other {
            return other.begin(session);
        }
        self.taps.use_queues(session.queues).map_err(fault)?;
        let tap = self.tap().ok_or_else(no_tap)?;
        tap.set_unsegmented(session.features.gso_v4, session.features.gso_v6).map_err(fault)
    }

    fn start(
        &mut self,
        index: usize,
        name: &str,
        queue: Queue<P, PrivateBuf, RecordFile>,
    ) -> Result<Worker, Fault> {
        let (wake, carrier) = (Arc::clone(&self.wake), Arc::clone(&self.carrier));
        let tell = move |news| match news {
            News::Stalled => carrier.stalled(true),
            News::Ready => carrier.stalled(false),
            News::Ended => wake(),
        };
        let knobs = Arc::clone(&self.knobs);
        let failed = |e| Fault::new("worker", format!("the queue's worker cannot start: {e}"));
        let mail = self.mail.get(index).map(OwnedFd::try_clone).transpose().map_err(failed)?;
        let started = if let Some(other) = &mut self.other {
            other.start(index, (name, queue, mail), knobs, tell)?
        } else {
            let tap = self.taps.get(index).ok_or_else(no_tap)?.try_clone().map_err(fault)?;
            let make = move |stats: Arc<Stats>| {
                let port = TapPort::new(tap, Arc::clone(&stats))?;
                Ok(knobs.around(port, stats, index))
            };
            Worker::start_woken(name, queue, make, mail, tell)
        };
        started.map_err(failed)
    }

    fn started(&mut self) {
        self.carrier.guest(true);
    }

    fn stopped(&mut self) {
        self.mail.clear();
        self.carrier.guest(false);
        self.other.iter_mut().for_each(Other::stopped);
        let quiet = self.tap().map_or(Ok(()), |tap| tap.set_unsegmented(false, false));
        if let Err(error) = self.taps.use_queues(1).and(quiet) {
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
