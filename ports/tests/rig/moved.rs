//! A driver domain that serves a vif as device processes would: each session has a link made of
//! descriptors and plain values, and threads without capabilities.

use pvio_hosted::Domain;
use pvio_netback::session::{Begin, SessionParts};
use pvio_netback::vif::{Attach, VifServer};
use pvio_netback::{Session, SessionSpec, Stats};
use pvio_ports::host::{LinkOpener, LinkQueues, NicConfig, OpenLink};
use pvio_ports::settings::RuntimeSettings;
use pvio_ring::shm::{HeapMemory, PAGE_SIZE};
use pvio_runtime::Gate;
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::common::DeviceAddr;
use pvio_xenbus::handshake::vif::{ToolstackBack, VifRate};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use std::sync::Arc;
use std::task::Poll;

/// What happens to the link when a session ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AtEnd {
    /// The session stops in order.
    Stop,
    /// The session does not change the link, and the next one finds it connected.
    Leave,
    /// As after the death of its process: the opener resets the link.
    Reset,
}

pub struct MovedServer {
    domain: Domain,
    opener: LinkOpener,
    at_end: AtEnd,
    stats: Vec<Arc<Stats>>,
    /// Gate of the session's workers.
    gate: Gate,
}

impl MovedServer {
    pub fn new(domain: Domain, config: NicConfig, at_end: AtEnd) -> Self {
        let opener = LinkOpener::new(config, Arc::new(|| ()));
        let stats = (0..opener.max_queues()).map(|_| Arc::default()).collect();
        Self { domain, opener, at_end, stats, gate: Gate::closed() }
    }
}

/// Runs `work` on a thread without capabilities, which its threads inherit.
fn confined<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            set_capabilities(None, sets).unwrap();
            work()
        });
        thread.join().unwrap()
    })
}

/// Returns a value as it arrives in another process.
#[cfg(feature = "serde")]
fn sent<T: serde::Serialize + serde::de::DeserializeOwned>(value: &T) -> T {
    serde_json::from_str(&serde_json::to_string(value).unwrap()).unwrap()
}

#[cfg(not(feature = "serde"))]
fn sent<T: Clone>(value: &T) -> T {
    value.clone()
}

impl VifServer for MovedServer {
    type Session = Session<Domain, HeapMemory, LinkQueues>;

    fn stats(&self) -> &[Arc<Stats>] {
        &self.stats
    }

    fn max_queues(&self) -> u32 {
        self.opener.max_queues()
    }

    fn open(&mut self, vif: &ToolstackBack, attach: Attach) -> Result<(), Fault> {
        self.opener.open(vif, attach)
    }

    fn close(&mut self) -> Poll<()> {
        self.opener.close()
    }

    fn resumable(&mut self, _: &SessionSpec) -> Result<(), Fault> {
        Err(Fault::new("record-missing", "there is none"))
    }

    fn start(&mut self, spec: &SessionSpec, begin: Begin) -> Result<Self::Session, Fault> {
        let link = self.opener.link().expect("opened before it is started");
        let (description, descriptors) = link.hand_over()?.expect("a link that can be moved");
        assert_eq!(description.descriptors(), descriptors.len());
        let (platform, stats) = (self.domain.clone(), self.stats.clone());
        let (spec, description) = (sent(spec), sent(&description));
        let wrappers = sent(self.opener.applied());
        self.gate = Gate::closed();
        let gate = self.gate.clone();
        confined(move || {
            let link = OpenLink::from_descriptors(&description, descriptors)?;
            let settings = RuntimeSettings::default();
            settings.apply(&wrappers, &Default::default())?;
            let record = HeapMemory::pages(spec.record_len().div_ceil(PAGE_SIZE));
            let queues = LinkQueues::new(link, Arc::new(settings), Arc::new(|| ()));
            let queues = queues.behind(gate);
            let parts = SessionParts { platform, record, limit: Arc::default(), stats, queues };
            Session::start(&spec, begin, parts)
        })
    }

    fn ready(&mut self, session: &mut Self::Session) -> Result<Poll<()>, Fault> {
        let ready = confined(|| session.ready())?;
        if ready.is_ready() {
            // The workers have created everything that they need.
            self.gate.open();
        }
        Ok(ready)
    }

    fn fault(&mut self, session: &mut Self::Session) -> Option<Fault> {
        session.fault()
    }

    fn stop(&mut self, session: &mut Self::Session) -> Poll<()> {
        if self.at_end == AtEnd::Stop {
            return confined(|| session.stop());
        }
        let stopped = confined(|| session.leave());
        if stopped.is_ready() && self.at_end == AtEnd::Reset {
            self.opener.link().expect("open").reset();
        }
        stopped
    }

    fn end(&mut self, _: DeviceAddr) {}

    fn set_rate(&mut self, session: &mut Self::Session, rate: Option<VifRate>) {
        session.set_rate(rate);
    }

    fn filter_groups(&mut self, session: &mut Self::Session, chosen: bool) {
        session.filter_groups(chosen);
    }

    fn set_headroom(&mut self, session: &mut Self::Session, bytes: u16) {
        session.set_headroom(bytes);
    }
}
