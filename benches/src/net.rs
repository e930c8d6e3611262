//! NIC: a guest's frontend, the backend and a tap, compared with a bare tap.
//!
//! Transmit: frames with an ethertype that has no listener, which the host's network stack drops
//! early. The reference writes the same frames to an identical tap from its own memory, in batches
//! through one io_uring. Receive: a thread on the host sends UDP datagrams into the tap during the
//! whole run; the reference reads them in batches and discards them. Frontend and reference run on
//! one core, the backend's worker on another, together with the sender.
//!
//! GSO packets come from another tap on a bridge, and are sent to an address that no station has.
//! There is a case for each way in which the backend accesses guest pages. On the hosted
//! hypervisor, the cost of a copy and of a mapping differs from Xen's.
//!
//! Must run in its own network namespace, with the permission to create interfaces.

pub(crate) mod beside;
mod wire;

use crate::cpu::{self, Thread};
use crate::pin::pin;
use crate::row::{Cpu, Row, paired};
use crate::until::{Done, Until};
use anyhow::{Result, ensure};
use pvio_event_channel::EventChannel;
use pvio_grant_table::DomId;
use pvio_grant_table::policy::{CachedMappings, GrantsStay};
use pvio_hosted::{Domain, DomainConfig, Hypervisor};
use pvio_netback::queue::{ControlRefs, EventPorts, Policy, QueueRefs, QueueSet, Waker};
use pvio_netback::{Features, Queue as Backend, Stats};
use pvio_netfront::{Checksum, Features as FrontFeatures, Gso, Queue};
use pvio_netfront::{Control, SendError};
use pvio_ports::tap::TapPort;
use pvio_ports::worker::{self, Worker};
use pvio_ring::proto::netif::GsoKind;
use pvio_runtime::{PrivateBuf, Spin};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use wire::{Link, Raw, SEGMENT, frame};

/// Duration of one run of pvio or of the reference in a pair.
const SLICE: Duration = Duration::from_millis(300);
/// Operations in flight on the reference's io_uring.
const BATCH: usize = 32;
/// Timeout for staging all pages.
const STAGING: Duration = Duration::from_secs(30);
/// Maximum number of cached mappings: all pages of the frontend.
const KEPT: usize = 512;

/// Name of the worker's thread.
const WORKER: &str = "bench-net";

/// A workload on the NIC.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Name of the case.
    pub name: &'static str,
    bytes: usize,
    receive: bool,
    /// The packets are GSO packets.
    gso: bool,
    reach: Reach,
}

/// How the backend accesses guest pages.
#[derive(Clone, Copy, Debug)]
enum Reach {
    By(Policy),
    Kept,
    /// Copied by the hypervisor, except staging grants, which are all pages of this frontend.
    Staged,
}

const fn case(name: &'static str, bytes: usize, receive: bool) -> Case {
    Case { name, bytes, receive, gso: false, reach: Reach::By(Policy::Copy) }
}

const fn gso(name: &'static str, receive: bool) -> Case {
    Case { gso: true, ..case(name, 65_000, receive) }
}

const fn by(reach: Reach, case: Case) -> Case {
    Case { reach, ..case }
}

const MAP: Reach = Reach::By(Policy::Map);

/// The cases.
pub const CASES: [Case; 20] = [
    case("tx-60", 60, false),
    case("tx-1514", 1514, false),
    case("rx-60", 60, true),
    case("rx-1514", 1514, true),
    gso("tx-gso", false),
    gso("rx-gso", true),
    by(MAP, case("tx-60-map", 60, false)),
    by(MAP, case("rx-1514-map", 1514, true)),
    by(MAP, gso("tx-gso-map", false)),
    by(MAP, gso("rx-gso-map", true)),
    by(Reach::Kept, case("tx-60-kept", 60, false)),
    by(Reach::Kept, case("rx-1514-kept", 1514, true)),
    by(Reach::Kept, gso("tx-gso-kept", false)),
    by(Reach::Kept, gso("rx-gso-kept", true)),
    by(Reach::Staged, case("tx-60-staged", 60, false)),
    by(Reach::Staged, case("tx-1514-staged", 1514, false)),
    by(Reach::Staged, case("rx-60-staged", 60, true)),
    by(Reach::Staged, case("rx-1514-staged", 1514, true)),
    by(Reach::Staged, gso("tx-gso-staged", false)),
    by(Reach::Staged, gso("rx-gso-staged", true)),
];

impl Case {
    /// Returns the unit of the figures, and the number of units per packet.
    fn unit(&self) -> (&'static str, f64) {
        if self.gso { ("Gbit/s", self.bytes as f64 * 8e-9) } else { ("packets/s", 1.0) }
    }
}

/// Measures every case whose name contains `only`, with `runs` pairs each.
///
/// # Errors
/// For example, there is no permission to create taps in this network namespace.
pub fn run(dir: &Path, runs: usize, only: &str) -> Result<Vec<Row>> {
    let cases = CASES.iter().filter(|case| case.name.contains(only));
    cases.map(|case| measure(&dir.join(case.name), case, runs)).collect()
}

fn measure(dir: &Path, case: &Case, runs: usize) -> Result<Row> {
    let mut raw = Raw::new(Link::new("pvioraw", 1, case)?)?;
    let mut ours = Attached::new(dir, case)?;
    let (unit, each) = case.unit();
    let (mut rates, mut times) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        pin(0);
        let reference = raw.run(case)?;
        let done = ours.run(Until::Time(SLICE))?;
        rates.push((done.done.per_second() * each, reference.done.per_second() * each));
        let worker = done.per_packet(done.worker);
        times.push([
            worker + done.per_packet(done.here),
            worker,
            reference.per_packet(reference.here),
        ]);
    }
    let row = paired("net", case.name, "raw tap", unit, &rates);
    Ok(Row { cpu: Some(Cpu::of(&times)), ..row })
}

/// A run with its processor time: of the thread that ran it, and of the backend's worker.
struct Spent {
    done: Done,
    here: Duration,
    worker: Duration,
}

impl Spent {
    /// Returns the nanoseconds per packet.
    fn per_packet(&self, time: Duration) -> f64 {
        time.as_nanos() as f64 / self.done.count as f64
    }
}

/// A NIC attached through the hosted hypervisor. Fields are dropped in this order.
pub struct Attached {
    _worker: Worker,
    worker_time: Thread,
    link: Link,
    case: Case,
    front: Queue<Domain>,
    _control: Option<Control<Domain>>,
    _driver: Domain,
    _hypervisor: Hypervisor,
    spin: Spin,
}

/// Makes the backend's queue serve a control ring.
fn serve_control(
    queue: &mut Backend<Domain, PrivateBuf>,
    guest: &Domain,
    driver: DomId,
) -> Result<Control<Domain>> {
    let control = Control::new(guest, driver)?;
    // The control ring's own events wake the queue, and there is no other queue to wake.
    let nothing: Waker = Arc::new(|| ());
    queue.join(&QueueSet::new([nothing]), 0);
    let refs = ControlRefs { ring: control.ring_gref(), event: control.channel().port() };
    queue.serve_control(&refs, true)?;
    Ok(control)
}

/// Requests that the backend stages the pages of a frontend.
fn stage(control: &mut Control<Domain>, front: &[Queue<Domain>]) -> Result<()> {
    let begin = Instant::now();
    while !control.is_done() {
        control.step(front)?;
        ensure!(begin.elapsed() < STAGING, "the backend does not respond");
        std::thread::yield_now();
    }
    ensure!(control.staged() == KEPT, "the backend staged {} pages", control.staged());
    Ok(())
}

impl Attached {
    /// Creates a tap and attaches a NIC to it.
    ///
    /// # Errors
    /// A part of the path cannot be set up.
    pub fn new(dir: &Path, case: &Case) -> Result<Self> {
        Self::with_link(dir, case, Link::new("pvioours", 2, case)?)
    }

    fn with_link(dir: &Path, case: &Case, link: Link) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let hypervisor = Hypervisor::start(dir.join("state"))?;
        let guest_id = hypervisor.create_domain(DomainConfig::new("guest"))?;
        let driver_id = hypervisor.create_domain(DomainConfig::new("driver"))?;
        let guest = Domain::join(dir.join("state"), guest_id)?;
        let driver = Domain::join(dir.join("state"), driver_id)?;
        let mut front = Queue::new(&guest, driver_id)?;
        front.set_features(FrontFeatures {
            sg: true,
            checksum_v4: true,
            checksum_v6: true,
            gso_v4: true,
            takes_gso_v4: true,
            ..FrontFeatures::default()
        });
        let refs = QueueRefs {
            tx_ring: front.tx_gref(),
            rx_ring: front.rx_gref(),
            events: EventPorts::Shared(front.channel().port()),
        };
        let features = Features {
            sg: true,
            gso_v4: true,
            sends_gso_v4: true,
            rx_notify: true,
            ..Features::LEAST
        };
        let stats = Arc::new(Stats::default());
        let mut queue = Backend::attach(driver.clone(), guest_id, &refs, features, stats)?;
        match case.reach {
            Reach::By(policy) => queue.set_policy(policy),
            // The frontend grants each of its pages once, for its whole lifetime.
            Reach::Kept => {
                let promise = GrantsStay::promised_by_the_peer();
                queue.use_cached_mappings(CachedMappings::new(driver.clone(), KEPT, promise));
            }
            Reach::Staged => {}
        }
        let mut control = match case.reach {
            Reach::Staged => Some(serve_control(&mut queue, &guest, driver_id)?),
            _ => None,
        };
        // A thread inherits the affinity of its creator.
        pin(1);
        let tap = link.tap.try_clone()?;
        let worker =
            worker::start(WORKER, queue, |stats| TapPort::new(tap, stats), Arc::new(|| ()))?;
        pin(0);
        if let Some(control) = &mut control {
            stage(control, core::slice::from_ref(&front))?;
        }
        let worker_time = Thread::named(WORKER)?;
        let spin = Spin::default();
        let (case, _driver, _hypervisor) = (*case, driver, hypervisor);
        Ok(Self {
            _worker: worker,
            worker_time,
            link,
            case,
            front,
            _control: control,
            _driver,
            _hypervisor,
            spin,
        })
    }

    /// Sends or receives packets until the run is over.
    ///
    /// # Errors
    /// Frontend or backend fails.
    pub fn drive(&mut self, until: Until) -> Result<Done> {
        Ok(self.run(until)?.done)
    }

    fn run(&mut self, until: Until) -> Result<Spent> {
        pin(0);
        let _sender = self.case.receive.then(|| self.link.sender(&self.case)).transpose()?;
        let (here, worker) = (cpu::of_this_thread(), self.worker_time.used()?);
        let is_over = |begin, packets| until.is_over(begin, packets);
        let done = if self.case.receive { self.receive(is_over) } else { self.send(is_over) }?;
        let (here, worker) = (cpu::of_this_thread() - here, self.worker_time.used()? - worker);
        Ok(Spent { done, here, worker })
    }

    /// Sends packets until the run is over. `is_over` is called with the time of the start and the
    /// number of packets.
    fn send(&mut self, is_over: impl Fn(Instant, u64) -> bool) -> Result<Done> {
        let frame = frame(&self.case);
        let pages = frame.len().div_ceil(4096) + usize::from(self.case.gso);
        let mut packets = 0;
        let begin = Instant::now();
        while !is_over(begin, packets) {
            for _ in 0..BATCH {
                let sent = if self.case.gso {
                    self.front.send_gso(&frame, Gso { size: SEGMENT, kind: GsoKind::TcpV4 })
                } else {
                    self.front.send(&frame, Checksum::Unknown)
                };
                match sent {
                    Ok(()) => packets += 1,
                    Err(SendError::Full) => break,
                    Err(other) => return Err(other.into()),
                }
            }
            self.front.publish()?;
            if !self.front.has_room(pages)? {
                self.wait()?;
            }
        }
        let time = begin.elapsed();
        ensure!(self.front.counters().tx_errors == 0, "the backend refused packets");
        Ok(Done { count: packets, time })
    }

    fn receive(&mut self, is_over: impl Fn(Instant, u64) -> bool) -> Result<Done> {
        let mut packets = 0;
        let begin = Instant::now();
        while !is_over(begin, packets) {
            let mut taken = 0;
            while taken < BATCH && self.front.receive(|_, _| ())?.is_some() {
                taken += 1;
            }
            packets += taken as u64;
            self.front.publish()?;
            if taken == 0 {
                self.wait()?;
            }
        }
        Ok(Done { count: packets, time: begin.elapsed() })
    }

    fn wait(&mut self) -> Result<()> {
        let front = &mut self.front;
        if self.spin.until(|| front.has_work())? {
            return Ok(());
        }
        if !front.final_check()? {
            self.spin.sleeping();
            front.channel().wait(Some(Duration::from_millis(100)))?;
            front.channel().take()?;
        }
        Ok(())
    }
}
