//! Serves vifs through taps, with one thread per queue, as a driver domain does.
#![forbid(unsafe_code)]

mod making;
mod other_port;
mod taps;

use crate::options::{NicOptions, Plug};
use crate::settings::{RuntimeSettings, Shares};
use crate::switch::Switches;
use crate::tap::{Tap, TapConfig, TapError};
use crate::tap_port::TapPort;
use crate::worker::{News, Worker};
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::net::Ipv4Addr;
use core::task::Poll;
use making::{Making, Unmaking, Way};
use other_port::OtherPort;
use pvio_netback::Platform;
use pvio_netback::queue::{Policy, Queue, Waker};
use pvio_netback::stats::Stats;
use pvio_netback::vif::{Attach, Serve, Session};
use pvio_recordfile::{RecordDir, RecordFile};
use pvio_runtime::{LogLimit, PrivateBuf};
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::vif::{MAX_QUEUES, ToolstackBack};
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use taps::{Carrier, Taps};

/// Settings of the driver domain for one vif, in addition to the toolstack's.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TapOptions {
    /// Name of the tap if the toolstack gives none (`vifname`). The default is
    /// `vif<domain>.<handle>`, as on Linux.
    pub name: Option<String>,
    /// Bridge to join if the toolstack gives none (`bridge`).
    pub bridge: Option<String>,
    /// Address of the driver domain on this link, and its prefix length.
    pub address: Option<(Ipv4Addr, u8)>,
    /// Largest number of queues of a guest. The default is the number of processors, up to
    /// [`QUEUES_DEFAULT`].
    pub max_queues: Option<u32>,
    /// How the guest's pages are accessed.
    pub policy: Policy,
}

/// Settings of all vifs of a driver domain.
#[derive(Debug, Default)]
pub struct NicSettings {
    /// Default options of a vif.
    pub defaults: NicOptions,
    /// Shared rates, by name.
    pub shares: Shares,
    /// Switches of this process.
    pub switches: Switches,
}

/// Default limit of the number of queues of a guest, as in Linux.
pub const QUEUES_DEFAULT: u32 = 8;

/// Serves a vif through a tap, whose carrier shows whether a guest is connected, or through another
/// port that [its options](NicOptions) select.
pub struct TapServer {
    options: TapOptions,
    wake: Waker,
    max_queues: u32,
    /// Number of queues of a session that an earlier process started.
    inherited: u32,
    way: Way,
    making: Option<Making>,
    unmaking: Option<Unmaking>,
    carrier: Arc<Carrier>,
    site: Arc<NicSettings>,
    knobs: Arc<RuntimeSettings>,
    /// Event descriptors by which the queues of the session wake each other, if it has a control
    /// ring.
    mail: Vec<OwnedFd>,
    records: Option<RecordDir>,
    /// Rate limits of log lines: a record could not be removed; a tap could not be reset after a
    /// session.
    records_left: Arc<LogLimit>,
    taps_changed: Arc<LogLimit>,
}

impl TapServer {
    /// Creates a server. `wake` may be called by any thread, when an operation that the driver
    /// waits for has ended or a worker has ended on its own. The driver must be stepped then.
    #[must_use]
    pub fn new(options: TapOptions, wake: Waker) -> Self {
        let processors = || std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        let max_queues = options.max_queues.unwrap_or_else(|| processors().min(QUEUES_DEFAULT));
        let carrier = Arc::default();
        Self {
            options,
            wake,
            max_queues,
            inherited: 0,
            way: Way::default(),
            making: None,
            unmaking: None,
            carrier,
            site: Arc::default(),
            knobs: Arc::default(),
            mail: Vec::new(),
            records: None,
            records_left: Arc::default(),
            taps_changed: Arc::default(),
        }
    }

    /// Returns the counters of rate-limited log lines, by name.
    pub fn events(&self) -> Vec<(&'static str, Arc<LogLimit>)> {
        let mut events = Vec::from([
            ("records-left", Arc::clone(&self.records_left)),
            ("taps-changed", Arc::clone(&self.taps_changed)),
            ("carrier-not-set", Arc::clone(self.carrier.failures())),
        ]);
        let starts = self.way.other.as_ref().and_then(OtherPort::starts);
        events.extend(starts.map(|starts| ("queue-starts", Arc::clone(starts))));
        events
    }

    /// Adds the settings of a driver domain.
    #[must_use]
    pub fn within(self, site: Arc<NicSettings>) -> Self {
        Self { site, ..self }
    }

    /// Stores in-flight records in this directory, so that another process can resume the sessions
    /// from it.
    #[must_use]
    pub fn recorded_in(self, records: RecordDir) -> Self {
        Self { records: Some(records), ..self }
    }

    /// Returns the settings that can be changed, and the capture point, while the vif runs.
    #[must_use]
    pub const fn knobs(&self) -> &Arc<RuntimeSettings> {
        &self.knobs
    }

    /// Returns the options of a vif from all sources: defaults, `bridge` and `options` keys.
    fn said_of(&self, vif: &ToolstackBack) -> Result<NicOptions, Fault> {
        let (_, words) = bridge_of(vif);
        let said = self.site.defaults.clone().and(&words.replace(';', ","))?;
        Ok(said.and(vif.options.as_deref().unwrap_or_default())?)
    }

    fn apply(&self, vif: &ToolstackBack, said: &NicOptions) -> Result<(), Fault> {
        self.knobs.apply(said, vif.mac.0, vif.ip.as_deref(), &self.site.shares)
    }

    /// Returns the tap, once it exists.
    #[must_use]
    pub fn tap(&self) -> Option<&Tap> {
        self.way.taps.first()
    }

    /// Returns the number of queues of new taps.
    fn tap_queues(&self) -> u32 {
        self.max_queues.max(self.inherited)
    }

    fn config(&self, vif: &ToolstackBack, attach: Attach, said: &NicOptions) -> TapConfig {
        let mut config = TapConfig::new(name_of(vif));
        config.netns.clone_from(&said.netns);
        config.mtu = vif.mtu.unwrap_or(config.mtu);
        config.multi_queue = self.tap_queues() > 1;
        match attach {
            Attach::ByScript => config.up = false,
            Attach::Here => {
                let name = vif.vifname.clone().or_else(|| self.options.name.clone());
                config.name = name.unwrap_or(config.name);
                let ours = || said.bridge.clone().or_else(|| self.options.bridge.clone());
                config.bridge = bridge_of(vif).0.map(String::from).or_else(ours);
                config.address = self.options.address;
            }
        }
        config
    }

    /// Starts the creation of the vif's port.
    fn begin_making(&self, vif: &ToolstackBack, attach: Attach) -> Result<Making, Fault> {
        let said = self.said_of(vif)?;
        self.apply(vif, &said)?;
        let (name, config) = (name_of(vif), self.config(vif, attach, &said));
        let (site, queues, named) = (Arc::clone(&self.site), self.tap_queues(), name.clone());
        let make = move || {
            let other = OtherPort::open(&said, &named, &site, queues)?;
            let taps = match &said.plug {
                _ if other.is_some() => Ok(Taps::default()),
                Plug::Opened(name) => Taps::open(name, said.netns.as_deref(), queues),
                _ => Taps::create_once_free(&config, queues),
            };
            Ok(Way { taps: taps.map_err(fault)?, other, said })
        };
        Making::begin(&name, make, Arc::clone(&self.wake))
    }

    fn made(&mut self, way: Way) -> Result<(), Fault> {
        self.way = way;
        let tap = self.tap().map(Tap::try_clone).transpose().map_err(fault)?;
        self.carrier.begin(tap);
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
        let failed = |e: io::Error| {
            let missing = resumed && e.kind() == io::ErrorKind::NotFound;
            let code = if missing { "record-missing" } else { "record-file" };
            Fault::new(code, format!("in-flight record {device}: {e}"))
        };
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
        if let Some(Err(error)) = self.records.as_ref().map(|dir| dir.remove(device))
            && let Some(unlogged) = self.records_left.admit()
        {
            tracing::warn!(device, %error, unlogged, "the in-flight record is not removed");
        }
    }

    fn max_queues(&self) -> u32 {
        let theirs = self.way.other.as_ref().and_then(OtherPort::queues);
        theirs.map_or(self.max_queues, |queues| queues.min(self.max_queues))
    }

    fn expect_queues(&mut self, queues: usize) {
        self.inherited = u32::try_from(queues).unwrap_or(u32::MAX).min(MAX_QUEUES);
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
                // The write fails only if the eventfd is at its limit, and then it is readable
                // already.
                let _ = rustix::io::write(&other, &1_u64.to_ne_bytes());
            };
            self.mail.push(mail);
            wakers.push(Arc::new(wake) as Waker);
        }
        Ok(wakers)
    }

    fn open(&mut self, vif: &ToolstackBack, attach: Attach) -> Result<(), Fault> {
        let way = self.begin_making(vif, attach)?.wait()?;
        self.made(way)
    }

    fn poll_open(&mut self, vif: &ToolstackBack, attach: Attach) -> Result<Poll<()>, Fault> {
        let making = match self.making.take() {
            Some(making) => making,
            None => self.begin_making(vif, attach)?,
        };
        match making.poll() {
            Some(way) => self.made(way?).map(Poll::Ready),
            None => {
                self.making = Some(making);
                Ok(Poll::Pending)
            }
        }
    }

    fn close(&mut self) -> Poll<()> {
        self.making = None;
        if !self.way.is_empty() {
            self.carrier.begin(None);
            let way = core::mem::take(&mut self.way);
            self.unmaking = Some(Unmaking::begin(way, Arc::clone(&self.wake)));
        }
        match &self.unmaking {
            Some(unmaking) if !unmaking.is_over() => Poll::Pending,
            _ => Poll::Ready(()),
        }
    }

    fn refresh(&mut self, vif: &ToolstackBack) -> Result<(), Fault> {
        let said = self.said_of(vif)?;
        let stays = |o: &NicOptions| (o.plug.clone(), o.bridge.clone(), o.netns.clone());
        if stays(&said) != stays(&self.way.said) {
            let why = "where a NIC leads to stays as it is until the NIC is removed";
            return Err(Fault::new("nic-options", why));
        }
        self.apply(vif, &said)
    }

    fn begin(&mut self, session: &Session) -> Result<(), Fault> {
        if let Some(other) = &mut self.way.other {
            return other.begin(session);
        }
        self.way.taps.use_queues(session.queues).map_err(fault)?;
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
            News::Begun | News::Ended => wake(),
        };
        let knobs = Arc::clone(&self.knobs);
        let failed = |e| Fault::new("worker", format!("the queue's worker cannot start: {e}"));
        let mail = self.mail.get(index).map(OwnedFd::try_clone).transpose().map_err(failed)?;
        let started = if let Some(other) = &mut self.way.other {
            other.start(index, (name, queue, mail), knobs, tell)?
        } else {
            let tap = self.way.taps.get(index).ok_or_else(no_tap)?.try_clone().map_err(fault)?;
            let make = move |stats: Arc<Stats>| {
                let port = TapPort::new(tap, Arc::clone(&stats))?;
                Ok(knobs.around(port, stats, index))
            };
            Worker::spawn(name, queue, make, mail, tell)
        };
        started.map_err(failed)
    }

    fn ready(&mut self, running: &mut Worker) -> Result<Poll<()>, Fault> {
        match running.ready() {
            Poll::Pending => Ok(Poll::Pending),
            Poll::Ready(Ok(())) => Ok(Poll::Ready(())),
            Poll::Ready(Err(error)) => {
                Err(Fault::new("worker", format!("the queue's worker cannot start: {error}")))
            }
        }
    }

    fn started(&mut self) {
        self.carrier.guest(true);
    }

    fn stopped(&mut self) {
        self.mail.clear();
        self.carrier.guest(false);
        self.way.other.iter_mut().for_each(OtherPort::stopped);
        let quiet = self.tap().map_or(Ok(()), |tap| tap.set_unsegmented(false, false));
        if let Err(error) = self.way.taps.use_queues(1).and(quiet)
            && let Some(unlogged) = self.taps_changed.admit()
        {
            // The next session sets both again and reports an error if that fails.
            tracing::debug!(%error, unlogged, "the tap is not as before the session");
        }
    }

    fn fault(&mut self, running: &mut Worker) -> Option<Fault> {
        running.error().map(|error| Fault::new(error.code(), error))
    }

    fn stop(&mut self, running: &mut Worker) -> Poll<()> {
        running.stop()
    }
}

fn name_of(vif: &ToolstackBack) -> String {
    format!("vif{}.{}", vif.frontend_id, vif.handle)
}

/// Splits the toolstack's `bridge` into the bridge's name and the options after it: `xl` has one
/// field for both, `bridge=NAME;WORD;WORD`.
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
            .field("taps", &self.way.taps)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_that_cannot_be_removed_is_counted() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("records");
        let records = RecordDir::open(&path).unwrap();
        std::fs::create_dir(path.join("vif-1-0")).unwrap();
        let mut server =
            TapServer::new(TapOptions::default(), Arc::new(|| ())).recorded_in(records);
        for _ in 0..12 {
            Serve::<pvio_hosted::Domain>::remove_record(&mut server, "vif-1-0");
        }
        let counted: Vec<_> =
            server.events().iter().map(|(name, log)| (*name, log.seen())).collect();
        assert_eq!(counted, [("records-left", 12), ("taps-changed", 0), ("carrier-not-set", 0)]);
    }
}
