//! Frontends that skip handshake steps or reconnect without closing: firmware, boot loaders, and
//! kernels started by kexec.

use crate::machine::{Driver, Machine, PATIENCE, image};
use pvio_blkback::{Config, Policy};
use pvio_blkfront::{Op, Queue};
use pvio_event_channel::EventChannel;
use pvio_hosted::Domain;
use pvio_ring::proto::blkif::Status;
use pvio_xenbus::client::Client;
use pvio_xenbus::handshake::common::{read_state, switch_state, write_state};
use pvio_xenbus::handshake::vbd::{FrontRequest, Mode, Protocol, Queue as QueueKeys};
use pvio_xenbus::{XenbusState, Xenstore};
use std::time::{Duration, Instant};

struct Bench {
    machine: Machine,
    driver: Driver,
    guest: Domain,
    xs: Client,
    content: Vec<u8>,
    _file: tempfile::NamedTempFile,
}

impl Bench {
    fn new(policy: Policy) -> Self {
        let machine = Machine::new(Config { policy, ..Config::default() });
        let file = image(1 << 20);
        let content = std::fs::read(file.path()).unwrap();
        machine.add_disk(file.path(), Mode::ReadOnly);
        let driver = machine.serve();
        let guest = machine.join(machine.guest);
        let xs = guest.xenstore().unwrap();
        Self { machine, driver, guest, xs, content, _file: file }
    }

    fn state(&mut self) -> XenbusState {
        read_state(&mut self.xs, &self.machine.addr().backend_path()).unwrap()
    }

    fn wait_for(&mut self, state: XenbusState) {
        let begin = Instant::now();
        while self.state() != state {
            assert!(begin.elapsed() < PATIENCE, "state {state} was not reached");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn queue(&self) -> Queue<Domain> {
        Queue::new(self.guest.clone(), self.machine.driver, 51712).unwrap()
    }

    fn ask(&mut self, queue: &Queue<Domain>) {
        let keys = QueueKeys {
            ring_refs: queue.ring_grefs().iter().map(|gref| gref.0).collect(),
            event_channel: queue.channel().port().0,
        };
        let (protocol, persistent) = (Some(Protocol::X86_64), true);
        let request = FrontRequest { protocol, persistent, queues: vec![keys] };
        request.write(&mut self.xs, &self.machine.addr().frontend_path()).unwrap();
    }

    /// Writes the state, even if it does not change.
    fn say(&mut self, state: XenbusState) {
        write_state(&mut self.xs, &self.machine.addr().frontend_path(), state).unwrap();
    }

    /// Reads through a queue that is or will be served.
    fn read(&self, queue: &mut Queue<Domain>) {
        let slot = queue.reserve().unwrap();
        queue.start(slot, Op::Read { sector: 80, bytes: 8192 }).unwrap();
        queue.publish().unwrap();
        let (begin, mut answers) = (Instant::now(), 0);
        while answers == 0 {
            assert!(begin.elapsed() < PATIENCE, "no response");
            answers = queue.poll(|_, _, status| assert_eq!(status, Status::Okay)).unwrap();
            std::thread::yield_now();
        }
        let mut got = vec![0; 8192];
        queue.fetch(slot, 0, &mut got).unwrap();
        assert!(got == self.content[80 * 512..][..8192]);
        queue.release(slot);
    }

    /// Waits until the pages of the previous queue are no longer mapped.
    fn is_let_go(&self, queue: Queue<Domain>) {
        let (begin, mut queue) = (Instant::now(), Some(queue));
        while let Some(still) = queue.take() {
            assert!(begin.elapsed() < PATIENCE, "page is still mapped");
            queue = still.dismantle().err();
        }
    }
}

const POLICIES: [Policy; 3] = [Policy::Map, Policy::Copy, Policy::PersistentOrMap];

#[test]
fn frontend_that_skips_to_connected_is_served() {
    for policy in POLICIES {
        let mut b = Bench::new(policy);
        b.wait_for(XenbusState::InitWait);
        let mut queue = b.queue();
        b.ask(&queue);
        b.say(XenbusState::Connected);
        b.wait_for(XenbusState::Connected);
        b.read(&mut queue);
        b.driver.end();
        drop(queue);
    }
}

#[test]
fn frontend_initialised_before_backend_offer_is_served() {
    let mut b = Bench::new(Policy::Map);
    // It starts before any backend, as GRUB may.
    let mut queue = b.queue();
    b.ask(&queue);
    b.say(XenbusState::Initialised);
    b.wait_for(XenbusState::Connected);
    b.read(&mut queue);
    b.driver.end();
}

#[test]
fn frontend_that_restarts_without_closing_is_reconnected() {
    use XenbusState as S;
    // The states that the next kernel writes, of which the backend may see only the last.
    let ways: [&[S]; 4] = [
        &[S::Initialising, S::Initialised],
        &[S::Initialised],
        &[S::Connected],
        &[S::Initialising],
    ];
    for (policy, said) in POLICIES.into_iter().flat_map(|p| ways.map(|way| (p, way))) {
        let mut b = Bench::new(policy);
        b.wait_for(S::InitWait);
        let mut old = b.queue();
        b.ask(&old);
        b.say(S::Initialised);
        b.wait_for(S::Connected);
        b.say(S::Connected);
        b.read(&mut old);
        println!("{policy}, {said:?}");
        for _ in 0..3 {
            let mut new = b.queue();
            let waits = said == [S::Initialising];
            if waits {
                b.say(S::Initialising);
                b.wait_for(S::InitWait);
            }
            b.ask(&new);
            if waits {
                b.say(S::Connected);
            }
            said.iter().filter(|_| !waits).for_each(|state| b.say(*state));
            b.read(&mut new);
            b.say(S::Connected);
            b.read(&mut new);
            b.is_let_go(std::mem::replace(&mut old, new));
            // Serving starts before the state is written.
            b.wait_for(S::Connected);
        }
        b.driver.end();
        drop(old);
    }
}

#[test]
fn frontend_that_closes_and_restarts_as_ovmf_is_served_again() {
    let mut b = Bench::new(Policy::PersistentOrMap);
    let front = b.machine.addr().frontend_path();
    for _ in 0..3 {
        b.wait_for(XenbusState::InitWait);
        let mut queue = b.queue();
        b.ask(&queue);
        b.say(XenbusState::Connected);
        b.wait_for(XenbusState::Connected);
        b.read(&mut queue);
        // As OVMF does: 5, then 6, then 1, with its keys removed in between.
        b.say(XenbusState::Closing);
        b.wait_for(XenbusState::Closing);
        b.say(XenbusState::Closed);
        b.wait_for(XenbusState::Closed);
        b.is_let_go(queue);
        for key in ["ring-ref", "event-channel"] {
            b.xs.rm(&format!("{front}/{key}")).unwrap();
        }
        switch_state(&mut b.xs, &front, XenbusState::Initialising).unwrap();
    }
    b.driver.end();
}
