//! xenstore over `/dev/xen/xenbus`.

use super::{Checks, LOST, Outcome, World, ensure, same, say};
use pvio_grant_table::DomId;
use pvio_xenbus::client::Client;
use pvio_xenbus::wire::{Op, XsErrno};
use pvio_xenbus::{Xenstore, XsError, transaction};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::time::Duration;

const DEVICE: &str = "/dev/xen/xenbus";
/// Directory below the domain's own one, in a part that it may write.
const BASE: &str = "data/pvio-selftest";

pub fn checks() -> Checks<'static> {
    vec![
        ("xenstore: nodes are read and written", Box::new(nodes)),
        ("xenstore: long values and long lists are read", Box::new(long)),
        ("xenstore: watches fire", Box::new(watches)),
        ("xenstore: event flood loses no path", Box::new(flood)),
        ("xenstore: invalid watch path is rejected", Box::new(refused_watch)),
        ("xenstore: transactions commit, abort and retry", Box::new(transactions)),
        ("xenstore: unknown transaction number is rejected", Box::new(no_transaction)),
        ("xenstore: reset of the kernel's watches is denied", Box::new(kernels)),
        ("xenstore: concurrent connections are independent", Box::new(two)),
    ]
}

fn connect() -> Result<Client, String> {
    let mut xs = Client::connect(DEVICE).map_err(|why| format!("{DEVICE}: {why}"))?;
    match xs.rm(BASE) {
        Ok(()) => {}
        Err(error) if error.is_absent() => {}
        Err(error) => return Err(say(error)),
    }
    Ok(xs)
}

fn node(name: &str) -> String {
    format!("{BASE}/{name}")
}

fn nodes(world: &mut World<'_>) -> Outcome {
    let mut xs = connect()?;
    let domid = String::from_utf8(xs.read("domid").map_err(say)?).map_err(say)?;
    same("domid", domid, world.me.id().to_string())?;
    same("missing", xs.read(&node("a")).map_err(|e| e.errno()), Err(Some(XsErrno::NoEnt)))?;
    xs.write(&node("a"), b"1\0\xff").map_err(say)?;
    same("value", xs.read(&node("a")).map_err(say)?, b"1\0\xff".to_vec())?;
    xs.write(&node("a/b"), b"").map_err(say)?;
    xs.mkdir(&node("c")).map_err(say)?;
    let mut names = xs.directory(BASE).map_err(say)?;
    names.sort();
    same("directory", names, vec!["a".to_owned(), "c".into()])?;
    let path = xs.domain_path(world.me.id()).map_err(say)?;
    same("path", path, format!("/local/domain/{}", world.me.id()))?;
    xs.rm(BASE).map_err(say)?;
    same("removed", xs.read(&node("a/b")).map_err(|e| e.errno()), Err(Some(XsErrno::NoEnt)))
}

fn long(world: &mut World<'_>) -> Outcome {
    let mut xs = connect()?;
    // A guest's quota is 2048 bytes for a value, and for the names in a directory.
    let value = vec![b'x'; 2000];
    xs.write(&node("long"), &value).map_err(say)?;
    ensure!(xs.read(&node("long")).map_err(say)? == value, "value read back differs");
    let count = if world.me.id() == DomId::DOM0 { 60 } else { 20 };
    let names: Vec<String> = (0..count).map(|i| format!("{i:02}-{}", "n".repeat(80))).collect();
    for name in &names {
        xs.write(&node(&format!("list/{name}")), b"").map_err(say)?;
    }
    let mut listed = xs.directory(&node("list")).map_err(say)?;
    listed.sort();
    same("a long list", listed, names)?;
    let too_long = xs.write(&node("a"), &vec![0; 4096]);
    same("too long", too_long, Err(XsError::TooLong))?;
    xs.rm(BASE).map_err(say)
}

fn readable(xs: &Client, ms: u64) -> Result<bool, String> {
    let time = Timespec::try_from(Duration::from_millis(ms)).map_err(say)?;
    Ok(poll(&mut [PollFd::new(xs, PollFlags::IN)], Some(&time)).map_err(say)? == 1)
}

fn event(xs: &mut Client) -> Result<(String, String), String> {
    let event = xs.wait_event(Some(LOST)).map_err(say)?.ok_or("no event")?;
    Ok((event.path, event.token))
}

fn quiet(xs: &mut Client) -> Outcome {
    same(
        "unexpected additional event",
        xs.wait_event(Some(Duration::from_millis(50))).map_err(say)?,
        None,
    )
}

fn watches(_: &mut World<'_>) -> Outcome {
    let (mut xs, mut other) = (connect()?, connect()?);
    let of = |name: &str, token: &str| (node(name), token.to_owned());
    xs.watch(&node("w"), "tok").map_err(say)?;
    same("first event", event(&mut xs)?, of("w", "tok"))?;
    quiet(&mut xs)?;
    ensure!(!readable(&xs, 0)?, "readable without an event");
    same("event without a change", xs.poll_event().map_err(say)?, None)?;
    other.write(&node("w/below"), b"1").map_err(say)?;
    ensure!(readable(&xs, 10_000)?, "not readable although an event is pending");
    same("below", event(&mut xs)?, of("w/below", "tok"))?;
    other.write(&node("elsewhere"), b"1").map_err(say)?;
    quiet(&mut xs)?;
    // An event that arrives while a response is awaited.
    xs.write(&node("w"), b"2").map_err(say)?;
    same("event of an own write", event(&mut xs)?, of("w", "tok"))?;
    other.rm(&node("w")).map_err(say)?;
    same("removed", event(&mut xs)?, of("w", "tok"))?;
    xs.unwatch(&node("w"), "tok").map_err(say)?;
    other.write(&node("w"), b"3").map_err(say)?;
    quiet(&mut xs)?;
    xs.watch("@releaseDomain", "special").map_err(say)?;
    same("special", event(&mut xs)?, ("@releaseDomain".to_owned(), "special".to_owned()))?;
    xs.rm(BASE).map_err(say)
}

fn flood(_: &mut World<'_>) -> Outcome {
    let (mut xs, mut other) = (connect()?, connect()?);
    xs.watch(&node("f"), "t").map_err(say)?;
    for i in 0..300 {
        other.write(&node(&format!("f/{}", i % 100)), format!("{i}").as_bytes()).map_err(say)?;
    }
    // By the time of this response, the last event has been sent; equal events are merged.
    let mut seen = std::collections::BTreeSet::new();
    while let Some(event) = xs.wait_event(Some(Duration::from_millis(200))).map_err(say)? {
        seen.insert(event.path);
    }
    same("paths", seen.len(), 101)?;
    xs.rm(BASE).map_err(say)
}

fn refused_watch(_: &mut World<'_>) -> Outcome {
    let mut xs = connect()?;
    let refused = xs.watch("no//path", "t").map_err(|error| error.errno());
    same("status of a watch on an invalid path", refused, Err(Some(XsErrno::Inval)))?;
    let refused = xs.watch("@nothing", "t").map_err(|error| error.errno());
    // Some servers reject an unknown special event, others accept any.
    ensure!(matches!(refused, Ok(()) | Err(Some(_))), "{refused:?}");
    xs.read("domid").map_err(say).map(drop)
}

fn transactions(_: &mut World<'_>) -> Outcome {
    let (mut xs, mut other) = (connect()?, connect()?);
    transaction(&mut xs, |tx| {
        tx.write(&node("t/1"), b"a")?;
        tx.write(&node("t/2"), b"b")?;
        // Not visible to other connections yet.
        assert!(other.read(&node("t/1")).unwrap_err().is_not_found());
        Ok::<_, XsError>(())
    })
    .map_err(say)?;
    same("committed", other.read(&node("t/2")).map_err(say)?, b"b".to_vec())?;
    let aborted = transaction(&mut xs, |tx| {
        tx.write(&node("t/1"), b"never")?;
        Err::<(), _>(XsError::Conflict)
    });
    same("aborted", aborted, Err(XsError::Conflict))?;
    same("value after the abort", other.read(&node("t/1")).map_err(say)?, b"a".to_vec())?;
    let mut rounds = 0;
    transaction(&mut xs, |tx| {
        rounds += 1;
        tx.read(&node("t/1"))?;
        if rounds == 1 {
            other.write(&node("t/1"), b"conflict")?;
        }
        tx.write(&node("t/1"), b"mine")?;
        Ok::<_, XsError>(())
    })
    .map_err(say)?;
    same("rounds", rounds, 2)?;
    same("after the conflict", xs.read(&node("t/1")).map_err(say)?, b"mine".to_vec())?;
    xs.rm(BASE).map_err(say)
}

fn no_transaction(_: &mut World<'_>) -> Outcome {
    let mut xs = connect()?;
    let path = node("x");
    let refused = xs.request(Op::Read, 4_000_000, &[path.as_bytes(), b"\0"]);
    same("status", refused.map_err(|error| error.errno()), Err(Some(XsErrno::NoEnt)))?;
    let ended = xs.transaction_end(4_000_000, true).map_err(|error| error.errno());
    same("end of an unknown transaction", ended, Err(Some(XsErrno::NoEnt)))?;
    xs.read("domid").map_err(say).map(drop)
}

fn kernels(_: &mut World<'_>) -> Outcome {
    let mut xs = connect()?;
    let refused = xs.request(Op::ResetWatches, 0, &[b"\0"]);
    same("status", refused.map_err(|error| error.errno()), Err(Some(XsErrno::Perm)))?;
    xs.read("domid").map_err(say).map(drop)
}

fn two(_: &mut World<'_>) -> Outcome {
    let mut threads = Vec::new();
    connect()?;
    for t in 0..4 {
        threads.push(std::thread::spawn(move || -> Outcome {
            let mut xs = Client::connect(DEVICE).map_err(say)?;
            xs.watch(&node(&format!("p/{t}")), "t").map_err(say)?;
            for i in 0..50 {
                let value = format!("{t} {i}");
                xs.write(&node(&format!("p/{t}")), value.as_bytes()).map_err(say)?;
                let read = xs.read(&node(&format!("p/{t}"))).map_err(say)?;
                same("a value", String::from_utf8_lossy(&read).into_owned(), value)?;
            }
            while let Some(event) = xs.poll_event().map_err(say)? {
                same("an event", event.path, node(&format!("p/{t}")))?;
            }
            Ok(())
        }));
    }
    for thread in threads {
        thread.join().map_err(|_| "a thread panicked")??;
    }
    connect().map(drop)
}
