//! What domains and hypervisors leave behind: nothing. A test binary of its own, since it counts
//! what the whole process has open.

mod support;

use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{Access, GrantMapper, Granter};
use support::{Host, mapped_memfds, open_fds};

#[test]
fn nothing_is_left_open_or_mapped() {
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
        (host, pages, ring, one, a, b, unbound)
    };
    drop(once());
    let before = (open_fds(), mapped_memfds());
    assert_eq!(before.1, 0);
    for _ in 0..20 {
        drop(once());
    }
    assert_eq!((open_fds(), mapped_memfds()), before);

    // While it runs, a hypervisor keeps nothing of the dead either, nor a living domain of a dead
    // peer once it let go of it.
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
}
