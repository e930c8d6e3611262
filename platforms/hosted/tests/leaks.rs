//! Domains and hypervisors leave no resources behind, and use no CPU while they are idle. A
//! separate test program, since it counts the open resources of the whole process.

mod support;

use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{Access, GrantMapper, Granter};
use std::collections::BTreeMap;
use support::{Host, mapped_memfds, open_fds};

#[test]
fn dropped_hypervisor_and_domains_leak_no_descriptor_or_mapping() {
    let once = || {
        let host = Host::new();
        let front = host.domain("front");
        let back = host.domain("back");
        let pages = front.alloc_pages(4).unwrap();
        let grefs =
            [3, 0, 1].map(|p| front.grant(back.id(), &pages, p, Access::ReadWrite).unwrap());
        let ring = back.map(front.id(), &grefs, Access::ReadWrite).unwrap();
        let one = back.map(front.id(), &grefs[..1], Access::ReadWrite).unwrap();
        let a = front.alloc_unbound(back.id()).unwrap();
        let b = back.bind_interdomain(front.id(), a.port()).unwrap();
        let unbound = front.alloc_unbound(back.id()).unwrap();
        b.notify().unwrap();
        assert!(back.bind_interdomain(front.id(), a.port()).is_err());
        let names = back.xenstore().unwrap();
        (host, pages, ring, one, a, b, unbound, names)
    };
    drop(once());
    let before = (open_fds(), mapped_memfds());
    assert_eq!(before.1, 0);
    for _ in 0..20 {
        drop(once());
    }
    assert_eq!((open_fds(), mapped_memfds()), before);

    // While it runs, a hypervisor holds no resources of destroyed domains, and neither does a
    // living domain of a destroyed peer once it has released its mappings.
    let host = Host::new();
    let back = host.domain("back");
    let before = (open_fds(), mapped_memfds());
    for _ in 0..20 {
        let front = host.domain("front");
        let id = front.id();
        let page = front.alloc_pages(1).unwrap();
        let gref = front.grant(back.id(), &page, 0, Access::ReadWrite).unwrap();
        let mapping = back.map(id, &[gref], Access::ReadWrite).unwrap();
        let a = front.alloc_unbound(back.id()).unwrap();
        let b = back.bind_interdomain(id, a.port()).unwrap();
        drop((page, a, front));
        host.wait_death(id);
        drop((mapping, b));
    }
    assert_eq!((open_fds(), mapped_memfds()), before);

    // With a domain joined and a channel bound, but no work, no thread wakes up.
    let front = host.domain("front");
    let a = front.alloc_unbound(back.id()).unwrap();
    let b = back.bind_interdomain(front.id(), a.port()).unwrap();
    assert!(b.take().unwrap());
    let before = settled_switches();
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(switches(), before);
}

/// Returns how often each thread but this one has gone to sleep, by name.
fn switches() -> BTreeMap<String, u64> {
    let read = |task: std::fs::DirEntry| -> Option<(String, u64)> {
        let status = std::fs::read_to_string(task.path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().to_owned()
        };
        let name = field("Name:");
        let ours = ["pvio-hypervisor", "xenstore"].contains(&name.as_str());
        ours.then(|| (name, field("voluntary_ctxt_switches:").parse().unwrap()))
    };
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks.filter_map(|task| read(task.unwrap())).collect()
}

/// As `switches`, once two successive values are equal: a thread may still be about to sleep.
fn settled_switches() -> BTreeMap<String, u64> {
    for _ in 0..1000 {
        let first = switches();
        std::thread::sleep(std::time::Duration::from_millis(20));
        if first == switches() {
            assert_eq!(first.len(), 2, "{first:?}");
            return first;
        }
    }
    panic!("threads do not stay asleep for 20 ms");
}
