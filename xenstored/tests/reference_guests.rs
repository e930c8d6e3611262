//! Two guests and dom0, on Debian's `xenstored` and on this crate's server: permissions and
//! delivered events must be the same.
#![cfg(feature = "std")]

mod common;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::time::Duration;

use common::Reference;
use common::ring::RingClient;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use pvio_ring::DomId;
use pvio_xenbus::client::Client;
use pvio_xenbus::wire::{Op, Perm, XsErrno, strings};
use pvio_xenbus::{Xenstore, XsError};
use pvio_xenstored::server::Server;
use pvio_xenstored::{Quota, Store};

/// A request of one of the three.
#[derive(Clone, Debug)]
struct Step {
    who: usize,
    op: Op,
    /// Whether it is part of the latest transaction, if there is one.
    in_tx: bool,
    payload: Vec<u8>,
}

fn step() -> impl Strategy<Value = Step> {
    use Op::{
        Directory, GetPerms, Mkdir, Read, Rm, SetPerms, TransactionEnd, TransactionStart, Unwatch,
        Watch, Write,
    };
    let path = proptest::sample::select(
        &[
            "a",
            "a/b",
            "a/b/c",
            "/local/domain/1",
            "/local/domain/1/a",
            "/local/domain/1/a/b",
            "/local/domain/2/a",
            "/local/domain/2/a/b",
            "/shared",
            "/shared/x",
            "/shared/x/y",
            "/",
            "/local/domain",
        ][..],
    );
    let entry = (proptest::sample::select(&["n", "r", "w", "b"][..]), 0..3_u8);
    let perms = proptest::collection::vec(entry, 1..4).prop_map(|list| {
        list.into_iter().map(|(letter, domid)| format!("{letter}{domid}\0")).collect::<String>()
    });
    let ops = vec![
        Write,
        Write,
        Write,
        Read,
        Read,
        Read,
        Directory,
        Mkdir,
        Rm,
        GetPerms,
        SetPerms,
        SetPerms,
        SetPerms,
        Watch,
        Watch,
        Unwatch,
        TransactionStart,
        TransactionEnd,
    ];
    (0..3_usize, proptest::sample::select(ops), any::<bool>(), path, perms, any::<bool>()).prop_map(
        |(who, op, in_tx, path, perms, flag)| {
            let payload = match op {
                Write => format!("{path}\0value"),
                SetPerms => format!("{path}\0{perms}"),
                Watch | Unwatch => format!("{path}\0token\0"),
                TransactionStart => "\0".into(),
                TransactionEnd => if flag { "T\0" } else { "F\0" }.into(),
                _ => format!("{path}\0"),
            };
            Step { who, op, in_tx, payload: payload.into_bytes() }
        },
    )
}

/// Dom0 and the two guests on one server.
struct Three {
    clients: [Box<dyn Xenstore>; 3],
    open: [u32; 3],
}

impl Three {
    /// Resets the state: no watches, no transactions, two home directories and a node that all may
    /// write to.
    fn reset(&mut self) {
        for xs in &mut self.clients {
            xs.request(Op::ResetWatches, 0, &[b"\0"]).unwrap();
            while xs.poll_event().unwrap().is_some() {}
        }
        self.open = [0; 3];
        let dom0 = &mut self.clients[0];
        for node in dom0.directory("/").unwrap() {
            dom0.rm(&format!("/{node}")).unwrap();
        }
        for (path, perms) in [
            ("/", "n0"),
            ("/local/domain", "n0"),
            ("/local/domain/1", "n1"),
            ("/local/domain/2", "n2"),
            ("/shared", "b0"),
        ] {
            dom0.mkdir(path).unwrap();
            dom0.set_perms(path, &[Perm::parse(perms.as_bytes()).unwrap()]).unwrap();
        }
    }

    fn run(&mut self, step: &Step) -> Result<Vec<u8>, XsErrno> {
        let tx =
            if step.in_tx && step.op != Op::TransactionStart { self.open[step.who] } else { 0 };
        let answer = match self.clients[step.who].request(step.op, tx, &[&step.payload]) {
            Ok(answer) => answer,
            Err(XsError::Refused { errno, .. }) => return Err(errno),
            Err(e) => panic!("{step:?}: {e}"),
        };
        Ok(match step.op {
            Op::TransactionStart => {
                let id =
                    std::str::from_utf8(&answer).unwrap().trim_end_matches('\0').parse().unwrap();
                self.open[step.who] = id;
                Vec::new()
            }
            Op::Directory => {
                strings(&answer).collect::<BTreeSet<_>>().into_iter().flatten().copied().collect()
            }
            _ => answer,
        })
    }

    /// Returns the distinct events sent to each.
    fn events(&mut self) -> Vec<BTreeSet<(String, String)>> {
        let all = self.clients.iter_mut().map(|xs| {
            xs.watch("/end-of-the-test", "end").unwrap();
            let mut seen = BTreeSet::new();
            while let Some(e) = xs.wait_event(Some(Duration::from_secs(10))).unwrap() {
                if e.token == "end" {
                    break;
                }
                seen.insert((e.path, e.token));
            }
            seen
        });
        all.collect()
    }
}

#[test]
fn server_treats_guest_requests_as_debian_xenstored() {
    let Some(reference) = Reference::start() else {
        return;
    };
    let mut tool = Client::connect(&reference.socket).unwrap();
    for domid in ["1", "2"] {
        let answer = tool
            .request(Op::Introduce, 0, &[domid.as_bytes(), b"\0", b"1\0", domid.as_bytes(), b"\0"])
            .unwrap();
        assert_eq!(answer, b"OK\0");
    }
    let guest =
        |domid| Box::new(RingClient::open(reference.dir.path(), domid)) as Box<dyn Xenstore>;
    let theirs = Three { clients: [Box::new(tool), guest(1), guest(2)], open: [0; 3] };

    // Debian's server limits the rate of guests' transactions long before this many.
    let ours = Server::new(Store::new(Quota::default())).spawn().unwrap();
    let local = |domid| Box::new(ours.connect_local(DomId(domid)).unwrap()) as Box<dyn Xenstore>;
    let mine = Three { clients: [local(0), local(1), local(2)], open: [0; 3] };
    ours.introduce(DomId(1)).unwrap();
    ours.introduce(DomId(2)).unwrap();

    let (theirs, mine) = (RefCell::new(theirs), RefCell::new(mine));
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(40);
    let mut runner = TestRunner::new(ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    runner
        .run(&proptest::collection::vec(step(), 1..50), |steps| {
            let (mut theirs, mut mine) = (theirs.borrow_mut(), mine.borrow_mut());
            theirs.reset();
            mine.reset();
            let mut doomed = [false; 3];
            for (i, step) in steps.iter().enumerate() {
                let (their_answer, my_answer) = (theirs.run(step), mine.run(step));
                // As in `reference.rs`: inside a transaction that can no longer be committed, the
                // two may differ.
                let doomed = &mut doomed[step.who];
                let within = step.in_tx
                    && !matches!(
                        step.op,
                        Op::TransactionStart | Op::TransactionEnd | Op::Watch | Op::Unwatch
                    );
                if within {
                    *doomed |= my_answer != their_answer;
                    if *doomed {
                        continue;
                    }
                }
                if step.op == Op::TransactionEnd && step.in_tx {
                    prop_assert!(
                        !*doomed || step.payload != b"T\0" || my_answer == Err(XsErrno::Again)
                    );
                    *doomed = false;
                }
                *doomed &= step.op != Op::TransactionStart;
                prop_assert_eq!(&my_answer, &their_answer, "at step {}: {:?}", i, step);
            }
            prop_assert_eq!(mine.events(), theirs.events());
            Ok(())
        })
        .unwrap();
    ours.check().unwrap().unwrap();
}
