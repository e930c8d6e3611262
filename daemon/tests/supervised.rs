//! The supervisor's side of a device process, with a process that has no device.

use pvio_daemon::process::child::Program;
use pvio_daemon::process::confine::Confinement;
use pvio_daemon::process::found::{Adoptable, FoundProcesses, Search};
use pvio_daemon::process::hub::Hub;
use pvio_daemon::process::messages::{Descriptor, FromDevice, Start, VERSION};
use pvio_daemon::process::registry::Registry;
use pvio_daemon::process::supervised::{Environment, Launch, Session, Supervised};
use pvio_daemon::stop::sleep;
use pvio_daemon::upgrade::progress::{Outcome, Upgrade};
use pvio_daemon::upgrade::stage::Stage;
use pvio_recordfile::RecordDir;
use pvio_xenbus::driver::Fault;
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const DEVICE: &str = "vbd-1-51712";
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Serialize)]
struct Serve {
    identity: u64,
}

#[derive(Default)]
struct Plan {
    identity: u64,
    starts: Mutex<Vec<Start>>,
    setting: AtomicU64,
}

impl Session for Plan {
    const COMMAND: &str = "disk";
    type Serve = Serve;
    type Change = u64;
    type Identity = u64;

    fn fence(&self) -> Option<String> {
        Some(format!("{DEVICE}.fence"))
    }

    fn survives(&self) -> bool {
        true
    }

    fn settings(&self) -> Vec<u64> {
        vec![self.setting.load(Ordering::Relaxed)]
    }

    fn changed(&self) -> Vec<u64> {
        Vec::new()
    }

    fn launch(
        &self,
        start: Start,
        fence: Option<OwnedFd>,
        _: Option<Duration>,
    ) -> Result<Launch<Serve>, Fault> {
        self.starts.lock().unwrap().push(start);
        let descriptors = fence.into_iter().map(|fence| (Descriptor::Fence, fence)).collect();
        Ok(Launch { descriptors, serve: Serve { identity: self.identity } })
    }
}

struct Rig {
    environment: Environment,
    plan: Arc<Plan>,
    wakes: Arc<AtomicU64>,
    changes: Vec<u64>,
    _dir: TempDir,
}

impl Rig {
    fn new(behaviour: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/device_process.py");
        let args = [script].iter().chain(behaviour).map(Into::into).collect();
        let environment = Environment {
            hub: Hub::new().unwrap(),
            registry: Registry::open(&dir.path().join("devices")).unwrap(),
            program: Program {
                path: "/usr/bin/env".into(),
                args: [vec!["python3".into()], args].concat(),
            },
            platform: "test",
            records: Some(RecordDir::open(&dir.path().join("inflight")).unwrap()),
            confinement: Confinement::default(),
            found: FoundProcesses::default(),
            upgrade: Upgrade::default(),
        };
        let (plan, wakes) = (Arc::default(), Arc::default());
        Self { environment, plan, wakes, changes: Vec::new(), _dir: dir }
    }

    fn wake(&self) -> Arc<dyn Fn() + Send + Sync> {
        let wakes = Arc::clone(&self.wakes);
        Arc::new(move || {
            wakes.fetch_add(1, Ordering::Relaxed);
        })
    }

    fn start(&self) -> Supervised<Plan> {
        let plan = Arc::clone(&self.plan);
        Supervised::start(DEVICE, &self.environment, plan, Start::New, self.wake()).unwrap()
    }

    /// Polls, when woken, until `done` returns a value.
    fn until<T>(
        &mut self,
        supervised: &mut Supervised<Plan>,
        mut done: impl FnMut(&Result<Poll<()>, Fault>, &[u64], &Supervised<Plan>) -> Option<T>,
    ) -> T {
        let begin = Instant::now();
        loop {
            // Before the poll: a wake-up during it may announce what it has not seen.
            let seen = self.wakes.load(Ordering::Relaxed);
            let changes = &mut self.changes;
            let polled = supervised.poll(&mut |message| {
                // The process reports the changes that it gets as layers that it lacks.
                if let FromDevice::Confined(applied) = message {
                    let missing = applied.failed();
                    changes.extend(
                        missing.iter().filter_map(|(_, why)| why.detail.parse::<u64>().ok()),
                    );
                }
            });
            if let Some(value) = done(&polled, changes, supervised) {
                return value;
            }
            let _ = polled.unwrap();
            // The thread that starts a process wakes without the hub.
            while self.wakes.load(Ordering::Relaxed) == seen {
                assert!(begin.elapsed() < PATIENCE, "nothing happened");
                sleep(&[self.environment.hub.as_fd()], Some(Duration::from_millis(20))).unwrap();
                self.environment.hub.dispatch().unwrap();
            }
        }
    }

    fn ready(&mut self, supervised: &mut Supervised<Plan>) {
        self.until(supervised, |polled, _, _| polled.as_ref().unwrap().is_ready().then_some(()));
    }

    /// Finds the process as the next supervisor does.
    fn find(&self) -> Adoptable<u64> {
        let Environment { hub, registry, .. } = &self.environment;
        let found = FoundProcesses::connect(registry).unwrap();
        let (mut search, begin) = (Search::Before, Instant::now());
        while search.poll(DEVICE, &found, hub, &self.wake()).is_pending() {
            assert!(begin.elapsed() < PATIENCE);
            sleep(&[hub.as_fd()], Some(Duration::from_millis(20))).unwrap();
        }
        let Search::Known(known) = search else { panic!("no process was found") };
        known
    }

    fn starts(&self) -> Vec<Start> {
        self.plan.starts.lock().unwrap().clone()
    }
}

fn kill(pid: Option<u32>) {
    let pid = pid.and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
}

fn stop(supervised: &mut Supervised<Plan>) {
    let begin = Instant::now();
    while supervised.stop().is_pending() {
        assert!(begin.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn killed_process_is_replaced_and_its_session_resumed() {
    let mut rig = Rig::new(&[]);
    let mut supervised = rig.start();
    rig.ready(&mut supervised);
    for times in 1..4 {
        let before = supervised.pid();
        kill(before);
        rig.until(&mut supervised, |_, _, supervised| {
            (supervised.replaced() == times).then_some(())
        });
        rig.ready(&mut supervised);
        assert_ne!(supervised.pid(), before);
    }
    assert_eq!(rig.starts(), [Start::New, Start::Resumed, Start::Resumed, Start::Resumed]);
    stop(&mut supervised);
}

#[test]
fn process_that_dies_before_it_serves_is_replaced_a_limited_number_of_times() {
    let mut rig = Rig::new(&["die-early"]);
    let mut supervised = rig.start();
    let fault = rig.until(&mut supervised, |polled, _, _| polled.as_ref().err().cloned());
    assert_eq!(fault.code, "device-process");
    assert!(fault.text.contains("exit code 3"), "{fault}");
    let starts = rig.starts();
    assert!(starts.len() > 5 && starts[1..].iter().all(|start| *start == Start::ResumedOrNew));
}

#[test]
fn fault_of_session_is_not_a_death_of_its_process() {
    let mut rig = Rig::new(&["fault"]);
    let mut supervised = rig.start();
    let fault = rig.until(&mut supervised, |polled, _, _| polled.as_ref().err().cloned());
    assert_eq!((&*fault.code, &*fault.text), ("ring-overflow", "the ring is full"));
    assert_eq!((rig.starts(), supervised.replaced()), (vec![Start::New], 0));
}

#[test]
fn process_that_sends_nonsense_is_replaced() {
    let mut rig = Rig::new(&["nonsense"]);
    let mut supervised = rig.start();
    rig.until(&mut supervised, |_, _, supervised| (supervised.replaced() == 1).then_some(()));
    let pid = rig.until(&mut supervised, |_, _, supervised| supervised.pid());
    kill(Some(pid));
}

#[test]
fn next_supervisor_finds_process_and_tells_it_the_settings() {
    let mut rig = Rig::new(&[]);
    let mut before = rig.start();
    rig.ready(&mut before);
    let pid = before.pid();
    before.leave();
    drop(before);
    rig.plan.setting.store(42, Ordering::Relaxed);
    let found = rig.find();
    assert_eq!((found.session, found.descriptors.len()), (Some(0), 0));
    let (plan, wake) = (Arc::clone(&rig.plan), rig.wake());
    let process = found.process;
    let mut supervised = Supervised::adopt(DEVICE, &rig.environment, plan, process, wake).unwrap();
    rig.ready(&mut supervised);
    assert_eq!((supervised.pid(), rig.starts()), (pid, vec![Start::New]));
    rig.until(&mut supervised, |_, changes, _| changes.contains(&42).then_some(()));
    kill(pid);
    rig.until(&mut supervised, |_, _, supervised| (supervised.replaced() == 1).then_some(()));
    rig.ready(&mut supervised);
    stop(&mut supervised);
}

/// Adopts the process as a supervisor of this upgrade does.
fn adopt(rig: &mut Rig, upgrade: &Upgrade) -> (Supervised<Plan>, Option<u32>) {
    let mut before = rig.start();
    rig.ready(&mut before);
    let pid = before.pid();
    before.leave();
    rig.environment.upgrade = upgrade.clone();
    let (process, plan, wake) = (rig.find().process, Arc::clone(&rig.plan), rig.wake());
    (Supervised::adopt(DEVICE, &rig.environment, plan, process, wake).unwrap(), pid)
}

fn replacing() -> Upgrade {
    Upgrade::new(Some(Stage::Replace), [DEVICE.to_owned()])
}

#[test]
fn adopted_process_is_moved_to_new_binary() {
    let (mut rig, upgrade) = (Rig::new(&[]), replacing());
    let (mut supervised, before) = adopt(&mut rig, &upgrade);
    rig.until(&mut supervised, |polled, _, _| {
        (polled.as_ref().unwrap().is_ready() && upgrade.status().pending.is_empty()).then_some(())
    });
    assert_ne!(supervised.pid(), before);
    let devices = upgrade.status().devices;
    assert!(matches!(devices[..], [(_, Outcome::Moved { pause: 1.. })]), "{devices:?}");
    assert_eq!((rig.starts(), supervised.replaced()), (vec![Start::New, Start::Resumed], 0));
    stop(&mut supervised);
}

#[test]
fn device_that_new_binary_cannot_serve_goes_back_to_old_one() {
    for wrong in ["/bin/false", "/nonexistent"] {
        let (mut rig, upgrade) = (Rig::new(&[]), replacing());
        let mut before = rig.start();
        rig.ready(&mut before);
        before.leave();
        rig.environment.upgrade = upgrade.clone();
        let (process, plan, wake) = (rig.find().process, Arc::clone(&rig.plan), rig.wake());
        // The old binary is that of the process: the interpreter, not the program that started it.
        rig.environment.program.path = wrong.into();
        rig.environment.program.args.remove(0);
        let adopted = Supervised::adopt(DEVICE, &rig.environment, plan, process, wake);
        let mut supervised = adopted.unwrap();
        rig.until(&mut supervised, |polled, _, _| {
            (polled.as_ref().unwrap().is_ready() && upgrade.status().pending.is_empty())
                .then_some(())
        });
        let devices = upgrade.status().devices;
        assert!(matches!(devices[..], [(_, Outcome::Kept(_))]), "{devices:?}");
        // Its successors are of the old binary, too.
        kill(supervised.pid());
        rig.until(&mut supervised, |polled, _, supervised| {
            (supervised.replaced() > 0 && polled.as_ref().unwrap().is_ready()).then_some(())
        });
        stop(&mut supervised);
    }
}

#[test]
fn process_of_previous_version_is_adopted_and_of_other_versions_not() {
    for (version, is_adopted) in [(VERSION - 1, true), (VERSION, true), (VERSION + 1, false)] {
        let mut rig = Rig::new(&[&format!("version={version}")]);
        let mut before = rig.start();
        rig.ready(&mut before);
        before.leave();
        let found = rig.find();
        assert_eq!(found.session.is_some(), is_adopted, "version {version}");
        found.process.kill();
    }
}
