//! Domains that are served through their shared pages: this crate's server and the client of
//! `pvio-xenbus`, with a simulated event channel between them.

use core::sync::atomic::Ordering;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use proptest::prelude::*;
use pvio_ring::byte_ring::{XENSTORE_REQ, XENSTORE_RSP};
use pvio_ring::shm::{HeapMemory, Region};
use pvio_ring::{ByteRing, DomId};
use pvio_xenbus::client::{RingClient, RingEvents};
use pvio_xenbus::wire::page::{CONNECTED, PageError, PageWord, RECONNECT};
use pvio_xenbus::wire::{Header, Op, XsErrno};
use pvio_xenbus::{Xenstore, XsError, transaction};
use pvio_xenstored::{RingConnection, Served, Store, StoreError};

const ZERO: Option<Duration> = Some(Duration::ZERO);

/// The server, and the pending events of the channels between it and the domains.
#[derive(Default)]
struct Machine {
    store: Store,
    connections: Vec<RingConnection<HeapMemory>>,
    to_server: Vec<bool>,
    to_domain: Vec<bool>,
    events: usize,
}

impl Machine {
    /// Serves all domains until there is no work.
    fn run(&mut self) {
        let mut work = true;
        while std::mem::take(&mut work) {
            for (i, connection) in self.connections.iter_mut().enumerate() {
                let has_event = std::mem::take(&mut self.to_server[i]);
                if !has_event && !self.store.has_output(connection.conn()) {
                    continue;
                }
                let Served { notify, more } = connection.serve(&mut self.store).unwrap();
                self.to_domain[i] |= notify;
                self.to_server[i] |= more;
                self.events += usize::from(notify);
                work |= notify | more;
            }
        }
        self.store.check().unwrap();
    }
}

/// A domain's end of its event channel. A deadline passes if nothing else can happen.
struct Events {
    machine: Rc<RefCell<Machine>>,
    index: usize,
}

impl RingEvents for Events {
    type Deadline = ();

    fn deadline(&self, _timeout: Duration) -> Option<()> {
        Some(())
    }

    fn notify(&mut self) -> Result<(), XsError> {
        self.machine.borrow_mut().to_server[self.index] = true;
        Ok(())
    }

    fn wait(&mut self, until: Option<()>) -> Result<bool, XsError> {
        let mut machine = self.machine.borrow_mut();
        machine.run();
        if std::mem::take(&mut machine.to_domain[self.index]) {
            return Ok(true);
        }
        match until {
            Some(()) => Ok(false),
            None => Err(XsError::Transport("no event can arrive any more".into())),
        }
    }
}

type Client = RingClient<HeapMemory, Events>;

fn set(page: &HeapMemory, at: usize, value: u32) {
    assert!(page.store_u32(at, value, Ordering::Relaxed));
}

fn machine() -> Rc<RefCell<Machine>> {
    Rc::default()
}

/// Connects a domain whose rings start at an index.
fn domain(machine: &Rc<RefCell<Machine>>, domid: u16, start: u32) -> (HeapMemory, Client) {
    let page = HeapMemory::pages(1);
    for stream in [XENSTORE_REQ, XENSTORE_RSP] {
        set(&page, stream.cons, start);
        set(&page, stream.prod, start);
    }
    let mut m = machine.borrow_mut();
    let m = &mut *m;
    let index = m.connections.len();
    m.connections.push(RingConnection::new(&mut m.store, DomId(domid), page.clone()).unwrap());
    m.to_server.push(false);
    m.to_domain.push(false);
    let events = Events { machine: Rc::clone(machine), index };
    (page.clone(), RingClient::attach(page, events).unwrap())
}

fn message(op: Op, body: &[u8]) -> Vec<u8> {
    [&Header::new(op, 7, 0, body.len()).unwrap().emit()[..], body].concat()
}

fn errno<T>(result: Result<T, XsError>) -> Option<XsErrno> {
    result.err().and_then(|error| error.errno())
}

#[test]
fn messages_larger_than_the_ring_pass_in_both_directions() {
    for start in [0, 1, u32::MAX, u32::MAX - 700, u32::MAX - 5000] {
        let machine = machine();
        let (_page, mut xs) = domain(&machine, 0, start);
        let value = vec![0xa5; 4000];
        xs.write("/big", &value).unwrap();
        assert_eq!(xs.read("/big").unwrap(), value);
        assert_eq!(errno(xs.read("/none")), Some(XsErrno::NoEnt));
        for n in 0..600 {
            xs.write(&format!("/many/node-{n:04}"), b"").unwrap();
        }
        let names = xs.directory("/many").unwrap();
        assert_eq!((names.len(), names[599].as_str()), (600, "node-0599"));
        let sum: Result<u32, XsError> = transaction(&mut xs, |tx| {
            tx.write("/many/sum", b"600")?;
            Ok(tx.directory("/many")?.len() as u32)
        });
        assert_eq!(sum, Ok(601));
    }
}

#[test]
fn events_reach_a_waiting_domain_and_a_flood_is_bounded() {
    let machine = machine();
    let (_, mut dom0) = domain(&machine, 0, 0);
    let (_, mut guest) = domain(&machine, 1, u32::MAX - 30);
    dom0.mkdir("/shared").unwrap();
    let all = pvio_xenbus::wire::Perm::parse(b"b0").unwrap();
    dom0.set_perms("/shared", &[all]).unwrap();
    guest.watch("/shared", "t").unwrap();
    assert_eq!(guest.wait_event(None).unwrap().unwrap().path, "/shared");
    assert_eq!(guest.wait_event(ZERO).unwrap(), None);
    dom0.write("/shared/a", b"1").unwrap();
    assert_eq!(guest.wait_event(None).unwrap().unwrap().path, "/shared/a");
    for n in 0..3000 {
        dom0.write(&format!("/shared/{n}"), b"").unwrap();
    }
    let mut seen = 0;
    while let Some(event) = guest.wait_event(ZERO).unwrap() {
        seen += 1;
        assert!(event.path.starts_with("/shared"));
    }
    assert!((1000..2500).contains(&seen), "{seen}");
    // The connection works, and nothing more is sent without a reason.
    assert_eq!(guest.read("/shared/2999").unwrap(), b"");
    machine.borrow_mut().run();
    let events = machine.borrow().events;
    machine.borrow_mut().to_server.fill(true);
    machine.borrow_mut().run();
    assert_eq!(machine.borrow().events, events);
}

#[test]
fn message_that_arrives_byte_by_byte_is_executed_once_complete() {
    let machine = machine();
    let (page, _) = domain(&machine, 0, u32::MAX - 8);
    let mut ring = ByteRing::xenstore_client(page).unwrap();
    for byte in &message(Op::Write, b"/x\0value") {
        assert_eq!(ring.readable(), Ok(0));
        assert_eq!(ring.write(&[*byte]), Ok(1));
        machine.borrow_mut().to_server[0] = true;
        machine.borrow_mut().run();
    }
    let mut response = [0; 64];
    let length = ring.read(&mut response).unwrap();
    assert_eq!(response[..length], message(Op::Write, b"OK\0"));
}

#[test]
fn domain_with_invalid_index_is_ignored_until_it_reconnects() {
    for (at, value) in [
        (XENSTORE_REQ.prod, 1025),
        (XENSTORE_REQ.prod, u32::MAX),
        (XENSTORE_RSP.cons, 1),
        (XENSTORE_RSP.cons, 1 << 31),
    ] {
        let machine = machine();
        let (_, mut other) = domain(&machine, 0, 0);
        let (page, mut xs) = domain(&machine, 1, 0);
        // With a response due, the server reads both indices of the domain.
        let mut ring = ByteRing::xenstore_client(page.clone()).unwrap();
        ring.write(&message(Op::Watch, b"w\0t\0")).unwrap();
        set(&page, at, value);
        machine.borrow_mut().to_server[1] = true;
        machine.borrow_mut().run();
        assert_eq!(PageWord::Error.load(&page), PageError::RingIndex.code(), "{at} {value}");
        assert_eq!(machine.borrow().connections[1].error(), Some(PageError::RingIndex));
        let lost = xs.read("x").unwrap_err();
        assert!(lost.is_connection_lost(), "{lost}");
        assert_eq!(xs.read("x").unwrap_err(), lost);
        // Other domains are served.
        other.write("/local/domain/1/x", b"1").unwrap();

        xs.reconnect().unwrap();
        assert_eq!(PageWord::Error.load(&page), 0);
        assert_eq!(PageWord::Connection.load(&page), CONNECTED);
        xs.watch("w", "t").unwrap();
        assert_eq!(xs.wait_event(None).unwrap().unwrap().token, "t");
        assert_eq!(errno(xs.watch("w", "t")), Some(XsErrno::Exist));
    }
}

#[test]
fn oversize_message_is_protocol_error() {
    let machine = machine();
    let (page, mut xs) = domain(&machine, 1, 0);
    let header = Header { kind: Op::Read.code(), req_id: 1, tx_id: 0, len: 4097 };
    ByteRing::xenstore_client(page.clone()).unwrap().write(&header.emit()).unwrap();
    machine.borrow_mut().to_server[0] = true;
    machine.borrow_mut().run();
    assert_eq!(PageWord::Error.load(&page), PageError::Protocol.code());
    xs.reconnect().unwrap();
    assert_eq!(errno(xs.read("x")), Some(XsErrno::Acces));
}

#[test]
fn reconnection_drops_watches_transactions_and_messages() {
    let machine = machine();
    let (page, mut xs) = domain(&machine, 1, u32::MAX - 100);
    xs.watch("w", "t").unwrap();
    for _ in 0..10 {
        xs.transaction_start().unwrap();
    }
    assert_eq!(errno(xs.transaction_start()), Some(XsErrno::NoSpc));
    // A predecessor in the same domain left half a message and an unread response.
    let mut ring = ByteRing::xenstore_client(page.clone()).unwrap();
    ring.write(&message(Op::Read, b"/\0")).unwrap();
    ring.write(&message(Op::Read, b"/path\0")[..10]).unwrap();
    machine.borrow_mut().to_server[0] = true;
    machine.borrow_mut().run();
    assert!(ring.readable().unwrap() > 0);

    let events = Events { machine: Rc::clone(&machine), index: 0 };
    let mut successor = RingClient::attach(page, events).unwrap();
    successor.reconnect().unwrap();
    assert_eq!(errno(successor.unwatch("w", "t")), Some(XsErrno::NoEnt));
    assert!(successor.transaction_start().is_ok());
    assert_eq!(machine.borrow().store.connections_of(DomId(1)), 1);
}

#[test]
fn released_domain_is_closed_and_cannot_reconnect() {
    let machine = machine();
    let (page, _) = domain(&machine, 1, 0);
    let mut m = machine.borrow_mut();
    let m = &mut *m;
    m.store.release(DomId(1));
    assert_eq!(m.connections[0].serve(&mut m.store), Err(StoreError::Closed));
    PageWord::Connection.store(&page, RECONNECT);
    assert_eq!(m.connections[0].serve(&mut m.store), Err(StoreError::Closed));
    assert_eq!(m.store.connections_of(DomId(1)), 0);
}

/// The server writes anything into the page of a client.
#[test]
fn hostile_server_causes_only_an_error() {
    struct Silent;

    impl RingEvents for Silent {
        type Deadline = ();

        fn deadline(&self, _timeout: Duration) -> Option<()> {
            Some(())
        }

        fn notify(&mut self) -> Result<(), XsError> {
            Ok(())
        }

        fn wait(&mut self, _until: Option<()>) -> Result<bool, XsError> {
            Err(XsError::Transport("no event can arrive any more".into()))
        }
    }

    let page = HeapMemory::pages(1);
    let mut xs = RingClient::attach(page.clone(), Silent).unwrap();
    let unsupported = xs.reconnect().unwrap_err();
    assert!(unsupported.to_string().contains("does not support"), "{unsupported}");
    assert_eq!(xs.poll_event(), Ok(None));
    for (at, value) in [(XENSTORE_RSP.prod, 1025), (XENSTORE_RSP.prod, 1 << 31)] {
        set(&page, at, value);
        let fault = Err(XsError::Protocol("an invalid ring index"));
        assert_eq!(xs.poll_event(), fault);
        set(&page, at, 0);
        assert_eq!(xs.poll_event(), fault, "the error remains");
        xs = RingClient::attach(page.clone(), Silent).unwrap();
    }
    set(&page, XENSTORE_REQ.cons, 7);
    assert_eq!(xs.read("x"), Err(XsError::Protocol("an invalid ring index")));
    set(&page, XENSTORE_REQ.cons, 0);
    PageWord::ServerFeatures.store(&page, u32::MAX);
    PageWord::Error.store(&page, 2);
    let mut xs = RingClient::attach(page, Silent).unwrap();
    let reported = xs.poll_event().unwrap_err();
    assert!(reported.to_string().contains("invalid ring index"), "{reported}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// A domain writes anything anywhere into its page.
    #[test]
    fn random_page_contents_do_not_harm_server(
        steps in proptest::collection::vec((0_usize..2100, any::<u32>(), any::<bool>(), 0_u32..64), 1..200),
        text: Vec<u8>,
    ) {
        let machine = machine();
        let (_, mut other) = domain(&machine, 0, 0);
        let (page, mut xs) = domain(&machine, 1, 0);
        let words = [2048, 2052, 2056, 2060, 2064, 2068, 2072];
        page.write_bytes(0, &text[..text.len().min(1024)]).unwrap();
        for (at, value, wild, near) in steps {
            let at = if at < 1900 { at / 4 * 4 } else { words[at % words.len()] };
            set(&page, at, if wild { value } else { near });
            let mut m = machine.borrow_mut();
            m.to_server[1] = true;
            m.run();
        }
        other.write("/alive", b"1").unwrap();
        // The domain may have overwritten this word, which its own client needs.
        PageWord::ServerFeatures.store(&page, 3);
        xs.reconnect().unwrap();
        prop_assert_eq!(errno(xs.read("x")), Some(XsErrno::Acces));
    }
}
