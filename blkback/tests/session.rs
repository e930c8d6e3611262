//! Tests of a session without xenstore: from its description to running queues.

use pvio_blkback::engine::mem::MemEngine;
use pvio_blkback::session::{self, record_name};
use pvio_blkback::{
    Begin, Buf, DataPath, Geometry, Progress, Queue, QueueFault, QueueParts, QueueServer, Session,
    SessionIdentity, SessionParts, SessionSpec,
};
#[cfg(feature = "serde")]
use pvio_blkback::{Config, Policy};
use pvio_blkfront::{Op, Queue as Front};
use pvio_event_channel::{DomId, EventChannel, EventChannels};
use pvio_grant_table::GrantMapper;
use pvio_grant_table::policy::MappingBudget;
use pvio_ring::proto::blkif::Status;
use pvio_ring::shm::{HeapMemory, PAGE_SIZE};
use pvio_sim::{LocalDomain, LocalMachine};
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr};
use pvio_xenbus::handshake::vbd::{BackOffer, FrontRequest, Negotiated, Protocol, Queue as Keys};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

const FRONT: DomId = DomId(2);
const BACK: DomId = DomId(1);
const DISK: u32 = 51712;

type Channel = <LocalDomain as EventChannels>::Channel;
type Engine = MemEngine<Buf<<LocalDomain as GrantMapper>::Mapping>>;
type Served = Queue<LocalDomain, Channel, Engine>;

/// Running queues, which the test polls.
#[derive(Clone, Default)]
struct Queues {
    running: Rc<RefCell<Vec<(String, Served)>>>,
    /// Number of queues that can be started.
    most: Option<usize>,
}

impl QueueServer<LocalDomain, HeapMemory> for Queues {
    type Running = String;

    fn start(
        &mut self,
        name: &str,
        parts: QueueParts<LocalDomain, Channel>,
    ) -> Result<String, Fault> {
        let mut running = self.running.borrow_mut();
        if self.most == Some(running.len()) {
            return Err(Fault::new("worker", "no thread is left"));
        }
        running.push((name.into(), Queue::new(parts, MemEngine::zeroed(64))));
        Ok(name.into())
    }

    fn fault(&mut self, _: &mut String) -> Option<QueueFault> {
        None
    }

    fn stop(&mut self, name: &mut String) -> Poll<()> {
        self.running.borrow_mut().retain(|(running, _)| running != name);
        Poll::Ready(())
    }
}

impl Queues {
    fn names(&self) -> Vec<String> {
        self.running.borrow().iter().map(|(name, _)| name.clone()).collect()
    }

    fn poll(&self) {
        for (_, queue) in &mut *self.running.borrow_mut() {
            while queue.poll(32).unwrap() == Progress::Some {}
        }
    }
}

/// A guest with a frontend for each queue, and the driver domain.
struct Rig {
    driver: LocalDomain,
    fronts: Vec<Front<LocalDomain>>,
    spec: SessionSpec,
    record: HeapMemory,
    queues: Queues,
}

impl Rig {
    fn new(queues: usize) -> Self {
        let machine = LocalMachine::new();
        let (guest, driver) = (machine.domain(FRONT), machine.domain(BACK));
        let fronts: Vec<_> =
            (0..queues).map(|_| Front::new(guest.clone(), BACK, 51712).unwrap()).collect();
        let keys = |front: &Front<LocalDomain>| Keys {
            ring_refs: front.ring_grefs().iter().map(|gref| gref.0).collect(),
            event_channel: front.channel().port().0,
        };
        let request = FrontRequest {
            protocol: Some(Protocol::X86_64),
            persistent: false,
            queues: fronts.iter().map(keys).collect(),
        };
        let addr = DeviceAddr::new(BackendKind::Vbd, BACK, FRONT, DISK);
        let spec = SessionSpec {
            identity: SessionIdentity::new(addr, &request),
            negotiated: Negotiated::new(&BackOffer::default(), &request),
            data_path: DataPath::Map,
            geometry: Geometry::new(64),
        };
        let len = spec.identity.record_len().unwrap();
        let record = HeapMemory::pages(len.div_ceil(PAGE_SIZE));
        Self { driver, fronts, spec, record, queues: Queues::default() }
    }

    fn start(&self, begin: Begin) -> Result<Session<LocalDomain, HeapMemory, Queues>, Fault> {
        let parts = SessionParts {
            platform: self.driver.clone(),
            record: self.record.clone(),
            flush_state: Arc::default(),
            mapping_budget: MappingBudget::unlimited(),
            stats: Vec::new(),
            queues: self.queues.clone(),
        };
        Session::start(&self.spec, begin, parts)
    }

    /// Submits a read in each queue.
    fn submit(&mut self) {
        for front in &mut self.fronts {
            let slot = front.reserve().unwrap();
            front.start(slot, Op::Read { sector: 0, bytes: 512 }).unwrap();
            front.publish().unwrap();
        }
    }

    /// Returns the number of responses in all queues.
    fn answers(&mut self) -> usize {
        let mut count = 0;
        for front in &mut self.fronts {
            count += front.poll(|_, _, status| assert_eq!(status, Status::Okay)).unwrap();
        }
        count
    }
}

#[test]
fn session_serves_all_queues_of_its_spec_without_xenstore() {
    let mut rig = Rig::new(2);
    let mut session = rig.start(Begin::New).unwrap();
    assert_eq!(session.ready(), Ok(Poll::Ready(())));
    assert_eq!(rig.queues.names(), ["vbd-2-51712-q0", "vbd-2-51712-q1"]);
    rig.submit();
    rig.queues.poll();
    assert_eq!(rig.answers(), 2);
    let reads: Vec<_> = session.stats().iter().map(|stats| stats.reads.get()).collect();
    assert_eq!(reads, [1, 1]);
    session.resize(8);
    assert_eq!(session.disk().geometry().sectors, 8);
    assert_eq!(session.stop(), Poll::Ready(()));
    assert_eq!((rig.driver.pages_mapped(), rig.driver.ports_open()), (0, 0));
}

#[test]
fn stopped_session_is_resumed_until_its_record_is_invalidated() {
    let mut rig = Rig::new(1);
    let identity = rig.spec.identity.clone();
    let resumable = |record: &HeapMemory| session::maps_requests(&identity, record.clone());
    assert_eq!(resumable(&rig.record).unwrap_err().code, "record-invalid");
    assert_eq!(rig.start(Begin::Resumed).err().unwrap().code, "record-invalid");
    drop(rig.start(Begin::New).unwrap());
    rig.queues.running.borrow_mut().clear();
    rig.submit();
    for begin in [Begin::Resumed, Begin::Again] {
        assert_eq!(resumable(&rig.record), Ok(true));
        let mut session = rig.start(begin).unwrap();
        assert_eq!(session.ready(), Ok(Poll::Ready(())));
        rig.queues.poll();
        assert_eq!(rig.answers(), 1);
        rig.submit();
        assert_eq!(session.stop(), Poll::Ready(()));
    }
    let mut other = rig.spec.identity.clone();
    other.queues[0].event_channel += 1;
    let found = session::maps_requests(&other, rig.record.clone());
    assert_eq!(found.unwrap_err().code, "record-other-session");
    session::invalidate(&rig.record);
    assert_eq!(resumable(&rig.record).unwrap_err().code, "record-invalid");
}

#[test]
fn ring_that_cannot_be_mapped_releases_all_queues_and_leaves_no_valid_record() {
    let mut rig = Rig::new(2);
    rig.spec.identity.queues[1].ring_refs = vec![9999];
    let mut session = rig.start(Begin::New).unwrap();
    let fault = session.ready().unwrap_err();
    assert!(fault.text.contains("9999"), "{fault}");
    assert_eq!((rig.driver.pages_mapped(), rig.driver.ports_open()), (0, 0));
    assert!(rig.queues.names().is_empty());
    assert_eq!(session.stop(), Poll::Ready(()));
    assert_eq!(rig.start(Begin::Resumed).err().unwrap().code, "record-invalid");
}

#[test]
fn queue_that_cannot_be_started_is_reported_and_the_others_can_be_stopped() {
    let mut rig = Rig::new(3);
    rig.queues.most = Some(2);
    let mut session = rig.start(Begin::New).unwrap();
    for _ in 0..2 {
        assert_eq!(session.ready().unwrap_err().code, "worker");
    }
    assert_eq!(rig.queues.names().len(), 2);
    assert_eq!(session.stop(), Poll::Ready(()));
    assert_eq!((rig.driver.pages_mapped(), rig.driver.ports_open()), (0, 0));
}

#[cfg(feature = "serde")]
#[test]
fn session_spec_sent_as_json_arrives_unchanged() {
    let mut spec = Rig::new(3).spec;
    spec.geometry.read_only = true;
    let discard = pvio_blkback::engine::Discard { granularity: 4096, alignment: 0, secure: true };
    spec.negotiated.max_indirect_segments = u32::MAX;
    for discard in [None, Some(discard)] {
        spec.geometry.discard = discard;
        for path in DataPath::ALL {
            spec.data_path = path;
            let text = serde_json::to_string(&spec).unwrap();
            let arrived: SessionSpec = serde_json::from_str(&text).unwrap();
            assert_eq!(arrived, spec, "{text}");
            assert_eq!(arrived.identity.key(), spec.identity.key());
            assert_eq!(arrived.max_indirect_segments(), 2048);
        }
    }
    let text = serde_json::to_string(&spec).unwrap();
    for (good, bad) in [("\"Vbd\"", "\"Tape\""), ("\"front\":2", "\"front\":-2")] {
        let text = text.replace(good, bad);
        assert!(text.contains(bad), "{text}");
        assert!(serde_json::from_str::<SessionSpec>(&text).is_err(), "{text}");
    }
    for begin in [Begin::New, Begin::Resumed, Begin::Again] {
        let text = serde_json::to_string(&begin).unwrap();
        assert_eq!(serde_json::from_str::<Begin>(&text).unwrap(), begin);
    }
    let config = Config { policy: Policy::PersistentOrCopy, ..Config::default() };
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<Config>(&text).unwrap(), config);
}

#[test]
fn ring_without_pages_is_rejected_before_anything_is_mapped() {
    let mut rig = Rig::new(1);
    rig.spec.identity.queues[0].ring_refs = Vec::new();
    assert_eq!(rig.start(Begin::New).err().unwrap().code, "ring-geometry");
    assert_eq!(record_name(rig.spec.identity.addr), "vbd-2-51712");
}
