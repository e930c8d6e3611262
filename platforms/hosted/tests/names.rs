//! xenstore from the view of domains.

mod support;

use pvio_hosted::{Domain, XenstoreError};
use pvio_xenbus::client::Client;
use pvio_xenbus::wire::XsErrno;
use pvio_xenbus::{Xenstore, XsError};
use support::{Host, LOST};

#[test]
fn domain_reads_and_writes_its_xenstore_home() {
    let host = Host::new();
    let guest = host.domain("guest");
    let mut xs = guest.xenstore().unwrap();
    let home = format!("/local/domain/{}", guest.id());
    assert_eq!(xs.domain_path(guest.id()).unwrap(), home);
    assert_eq!(xs.read("name").unwrap(), b"guest");
    assert_eq!(xs.read(&format!("{home}/domid")).unwrap(), guest.id().to_string().as_bytes());
    xs.write("data/mine", b"1").unwrap();
    let refused = |result: Result<(), XsError>| result.unwrap_err().errno();
    assert_eq!(refused(xs.write("name", b"other")), Some(XsErrno::Acces));
    assert_eq!(refused(xs.write("device/vbd", b"")), Some(XsErrno::Acces));
}

#[test]
fn domain_cannot_read_home_of_other_domain() {
    let host = Host::new();
    let (guest, other) = (host.domain("guest"), host.domain("other"));
    guest.xenstore().unwrap().write("data/mine", b"1").unwrap();
    let mut xs = other.xenstore().unwrap();
    for node in ["name", "data/mine"] {
        let read = xs.read(&format!("/local/domain/{}/{node}", guest.id()));
        assert_eq!(read.unwrap_err().errno(), Some(XsErrno::Acces), "{node}");
    }
}

#[test]
fn tool_connection_has_dom0_access_to_same_store() {
    let host = Host::new();
    let guest = host.create("guest");
    let path = format!("/local/domain/{guest}/device/vbd/51712/state");
    let mut tool = Client::connect(host.dir.path().join("xenstore.sock")).unwrap();
    tool.write(&path, b"1").unwrap();
    assert_eq!(host.hypervisor.xenstore().unwrap().read(&path).unwrap(), b"1");
    assert_eq!(host.join(guest).xenstore().unwrap().read("device/vbd/51712/state").unwrap(), b"1");
}

#[test]
fn domain_death_removes_its_nodes_and_fires_release_watch() {
    let host = Host::new();
    let guest = host.domain("guest");
    let id = guest.id();
    let mut theirs = guest.xenstore().unwrap();
    theirs.write("data/mine", b"1").unwrap();
    let mut xs = host.hypervisor.xenstore().unwrap();
    xs.watch("@releaseDomain", "death").unwrap();
    assert_eq!(
        xs.wait_event(Some(LOST)).unwrap().unwrap().token,
        "death",
        "first event of the watch"
    );
    assert_eq!(xs.poll_event().unwrap(), None);
    drop(guest);
    assert_eq!(xs.wait_event(Some(LOST)).unwrap().unwrap().token, "death");
    host.wait_death(id);
    assert_eq!(xs.read_opt(&format!("/local/domain/{id}")).unwrap(), None);
    assert_eq!(theirs.read("name"), Err(XsError::Closed), "its connections were closed");
}

#[test]
fn recreated_domain_gets_its_name_and_empty_home() {
    let host = Host::new();
    for _ in 0..3 {
        let guest: Domain = host.domain("guest");
        let mut xs = guest.xenstore().unwrap();
        assert_eq!(xs.read_opt("data/mine").unwrap(), None);
        xs.write("data/mine", b"1").unwrap();
        drop(xs);
        let id = guest.id();
        drop(guest);
        host.wait_death(id);
    }
}

#[test]
fn xenstore_connections_of_domain_are_limited() {
    let host = Host::new();
    let (greedy, other) = (host.domain("greedy"), host.domain("other"));
    let mut held: Vec<_> = std::iter::from_fn(|| greedy.xenstore().ok()).take(10_000).collect();
    assert_eq!(held.len(), 4096);
    assert!(matches!(greedy.xenstore(), Err(XenstoreError::TooMany)));
    other.xenstore().unwrap().read("name").unwrap();
    // A closed connection frees a place, once the server has noticed.
    drop(held.pop());
    let deadline = std::time::Instant::now() + LOST;
    let mut again = loop {
        match greedy.xenstore() {
            Ok(xs) => break xs,
            Err(why) => assert!(std::time::Instant::now() < deadline, "{why}"),
        }
        std::thread::yield_now();
    };
    again.read("name").unwrap();
}
