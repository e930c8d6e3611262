//! Domains in separate processes.

mod support;

use libtest_mimic::{Arguments, Trial};
use pvio_grant_table::DomId;
use pvio_hosted::{Domain, DomainConfig, Hypervisor, JoinError};
use pvio_xenbus::Xenstore;
use support::process::{Process, serve};
use support::{Host, LOST};

fn main() {
    if serve() {
        return;
    }
    let tests: [(&str, fn()); 9] = [
        (
            "page_shared_between_processes_is_busy_while_mapped",
            page_shared_between_processes_is_busy_while_mapped,
        ),
        (
            "scattered_grants_map_contiguously_between_processes",
            scattered_grants_map_contiguously_between_processes,
        ),
        ("killed_process_releases_its_mappings", killed_process_releases_its_mappings),
        (
            "process_killed_during_map_releases_its_mappings",
            process_killed_during_map_releases_its_mappings,
        ),
        ("mapping_of_killed_process_stays_usable", mapping_of_killed_process_stays_usable),
        ("no_wakeup_is_lost_between_processes", no_wakeup_is_lost_between_processes),
        (
            "ports_of_killed_domain_are_not_inherited_by_successor",
            ports_of_killed_domain_are_not_inherited_by_successor,
        ),
        (
            "second_hypervisor_process_in_same_directory_is_rejected",
            second_hypervisor_process_in_same_directory_is_rejected,
        ),
        (
            "killed_hypervisor_is_replaced_in_its_directory",
            killed_hypervisor_is_replaced_in_its_directory,
        ),
    ];
    let trial = |(name, test): (&str, fn())| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
    };
    libtest_mimic::run(&Arguments::from_args(), tests.map(trial).into()).exit();
}

/// Two processes, each joined as a domain.
struct Pair {
    host: Host,
    front: Process,
    back: Process,
    front_id: DomId,
    back_id: DomId,
}

impl Pair {
    fn new() -> Self {
        let host = Host::new();
        let (front_id, back_id) = (host.create("front"), host.create("back"));
        let front = Process::domain(host.dir.path(), front_id);
        let back = Process::domain(host.dir.path(), back_id);
        Self { host, front, back, front_id, back_id }
    }

    /// Makes the front grant its first `pages` pages in that order, and the back map them.
    fn share(&mut self, count: u32, pages: &[u32]) -> Vec<String> {
        assert_eq!(self.front.ask(format!("alloc {count}")), "done");
        let grant = |page| self.front.ask(format!("grant {} {page} rw", self.back_id));
        let grefs: Vec<String> = pages.iter().map(grant).collect();
        let map = format!("map {} rw {}", self.front_id, grefs.join(" "));
        assert_eq!(self.back.ask(map), "done");
        grefs
    }

    fn bind(&mut self) -> String {
        let port = self.front.ask(format!("listen {}", self.back_id));
        let front = self.front_id;
        assert_eq!(self.back.ask(format!("bind {front} {port}")), "done");
        port
    }
}

fn page_shared_between_processes_is_busy_while_mapped() {
    let mut pair = Pair::new();
    let [gref] = pair.share(1, &[0]).try_into().unwrap();
    assert_eq!(pair.front.ask("write 10 ping"), "done");
    assert_eq!(pair.back.ask("read 10 4"), "ping");
    assert_eq!(pair.back.ask("write 4092 pong"), "done");
    assert_eq!(pair.front.ask("read 4092 4"), "pong");
    assert_eq!(pair.front.ask(format!("end {gref}")), "busy");
    assert_eq!(pair.back.ask("unmap"), "done");
    assert_eq!(pair.front.ask(format!("end {gref}")), "done");
    let again = format!("map {} rw {gref}", pair.front_id);
    assert_eq!(pair.back.ask(again), "grant-bad-reference");
}

fn scattered_grants_map_contiguously_between_processes() {
    let mut pair = Pair::new();
    pair.share(8, &[7, 2, 3, 0]);
    assert_eq!(pair.front.ask(format!("write {} seventh", 7 * 4096)), "done");
    assert_eq!(pair.front.ask(format!("write {} third", 3 * 4096)), "done");
    assert_eq!(pair.back.ask("read 0 7"), "seventh");
    assert_eq!(pair.back.ask(format!("read {} 5", 2 * 4096)), "third");
    assert_eq!(pair.back.ask(format!("write {} across", 4096 - 3)), "done");
    assert_eq!(pair.front.ask(format!("read {} 3", 8 * 4096 - 3)), "acr");
    assert_eq!(pair.front.ask(format!("read {} 3", 2 * 4096)), "oss");
}

fn killed_process_releases_its_mappings() {
    let mut pair = Pair::new();
    let grefs = pair.share(4, &[3, 1]);
    let mut xs = pair.host.hypervisor.xenstore().unwrap();
    xs.watch("@releaseDomain", "death").unwrap();
    xs.wait_event(Some(LOST)).unwrap().expect("the first event");
    assert_eq!(pair.front.ask(format!("end {}", grefs[0])), "busy");
    pair.back.kill();
    pair.host.wait_death(pair.back_id);
    for gref in &grefs {
        assert_eq!(pair.front.ask(format!("end {gref}")), "done");
    }
    xs.wait_event(Some(LOST)).unwrap().expect("its release");
    let home = format!("/local/domain/{}", pair.back_id);
    assert_eq!(xs.read_opt(&home).unwrap(), None);
}

fn process_killed_during_map_releases_its_mappings() {
    let host = Host::new();
    let front_id = host.create("front");
    let mut front = Process::domain(host.dir.path(), front_id);
    front.ask("alloc 1");
    for round in 0..20 {
        let back_id = host.create(&format!("back-{round}"));
        let mut back = Process::domain(host.dir.path(), back_id);
        let gref = front.ask(format!("grant {back_id} 0 rw"));
        assert_eq!(back.ask(format!("storm {front_id} {gref}")), "done");
        // The process is killed at a random point of its loop.
        std::thread::sleep(std::time::Duration::from_micros(97 * round));
        back.kill();
        host.wait_death(back_id);
        assert_eq!(front.ask(format!("end {gref}")), "done", "round {round}");
    }
}

fn mapping_of_killed_process_stays_usable() {
    let mut pair = Pair::new();
    let grefs = pair.share(4, &[2, 0]);
    assert_eq!(pair.front.ask(format!("write {} last-words", 2 * 4096)), "done");
    pair.front.kill();
    pair.host.wait_death(pair.front_id);
    assert_eq!(pair.back.ask("read 0 10"), "last-words");
    assert_eq!(pair.back.ask("write 4096 unheard"), "done");
    let again = format!("map {} rw {}", pair.front_id, grefs[0]);
    assert_eq!(pair.back.ask(again), "grant-bad-domain");
    assert_eq!(pair.back.ask("unmap"), "done");
}

fn no_wakeup_is_lost_between_processes() {
    let mut pair = Pair::new();
    pair.share(1, &[0]);
    pair.bind();
    for (game, turns) in [("lockstep", 20_000), ("flood", 500_000)] {
        pair.front.tell(format!("{game} first {turns}"));
        pair.back.tell(format!("{game} second {turns}"));
        assert_eq!(pair.front.answer(), "done");
        assert_eq!(pair.back.answer(), "done");
    }
}

fn ports_of_killed_domain_are_not_inherited_by_successor() {
    let mut pair = Pair::new();
    let port = pair.bind();
    assert_eq!(pair.front.ask("notify"), "done");
    assert_eq!(pair.back.ask("wait"), "done");
    pair.back.kill();
    pair.host.wait_death(pair.back_id);
    assert_eq!(pair.front.ask("notify"), "done", "nobody hears, nobody minds");
    // A later domain with the same id is a different domain.
    let again = DomainConfig::new("back").id(pair.back_id);
    pair.host.hypervisor.create_domain(again).unwrap();
    let mut back = Process::domain(pair.host.dir.path(), pair.back_id);
    assert_eq!(back.ask(format!("bind {} {port}", pair.front_id)), "event-bad-port");
    let port = pair.front.ask(format!("listen {}", pair.back_id));
    assert_eq!(back.ask(format!("bind {} {port}", pair.front_id)), "done");
    assert_eq!(back.ask("wait"), "done", "the first event");
    assert_eq!(pair.front.ask("notify"), "done");
    assert_eq!(back.ask("wait"), "done");
}

fn second_hypervisor_process_in_same_directory_is_rejected() {
    let host = Host::new();
    let (_second, answer) = Process::hypervisor(host.dir.path());
    assert_eq!(answer, "hosted-running");
    host.domain("still-served").xenstore().unwrap().read("name").unwrap();
}

fn killed_hypervisor_is_replaced_in_its_directory() {
    let dir = tempfile::tempdir().unwrap();
    let (first, answer) = Process::hypervisor(dir.path());
    assert_eq!(answer, "running");
    first.kill();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "its sockets");
    let joined = Domain::join(dir.path(), DomId(1));
    assert!(matches!(joined, Err(JoinError::NoHypervisor(_))));
    let second = Hypervisor::start(dir.path()).unwrap();
    let id = second.create_domain(DomainConfig::new("guest")).unwrap();
    Domain::join(dir.path(), id).unwrap().xenstore().unwrap().read("name").unwrap();
    drop(second);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
