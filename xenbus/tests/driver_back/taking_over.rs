//! A backend takes over from one that died in state InitWait, or lost its session.

use super::*;

/// Returns a backend that has offered and died; its frontend has made a request and is in state
/// `front`.
fn interrupted(front: XenbusState, unresumable: Option<&'static str>) -> Bench {
    let mut b = Bench::new(HotplugMode::Plain);
    b.step();
    assert_eq!(b.state(), XenbusState::InitWait);
    b.frontend(front);
    b.succeed(unresumable);
    b
}

const REQUESTED: [XenbusState; 2] = [XenbusState::Initialised, XenbusState::Connected];

#[test]
fn frontend_whose_request_no_backend_took_is_connected_by_the_successor() {
    for front in REQUESTED {
        for why in ["record-missing", "record-invalid", "record-other-session"] {
            let mut b = interrupted(front, Some(why));
            assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::Connected), "{why}");
            assert!(b.class.connected.get() && b.class.forgotten.get());
            assert!(b.has("described") && !b.has("pvio-session-lost"));
        }
    }
}

#[test]
fn session_that_was_served_and_not_announced_is_resumed_and_announced() {
    for front in REQUESTED {
        let mut b = interrupted(front, None);
        b.world.dom0.rm(&format!("{}/offered", b.back)).unwrap();
        assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::Connected), "{front}");
        assert!(b.class.connected.get() && !b.class.forgotten.get());
        assert!(b.has("described") && !b.has("offered"));
    }
}

#[test]
fn session_that_may_have_been_served_without_a_usable_record_is_lost() {
    for why in ["record-file", "record-version", "record-size"] {
        let mut b = interrupted(XenbusState::Connected, Some(why));
        assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::InitWait), "{why}");
        assert!(!b.class.connected.get() && !b.class.forgotten.get());
        assert!(b.has("pvio-session-lost"));
    }
}

#[test]
fn frontend_whose_session_is_lost_is_waited_for_by_every_later_backend() {
    let mut b = Bench::connected();
    for unresumable in [Some("record-missing"), Some("record-missing"), None] {
        b.succeed(unresumable);
        assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::InitWait));
        assert!(!b.class.connected.get(), "its requests would be lost");
        assert!(b.has("pvio-session-lost") && !b.class.forgotten.get());
    }
    // The frontend restarts: from here on no session is lost, not even for a successor.
    b.frontend(XenbusState::Initialising);
    b.step();
    assert!(!b.has("pvio-session-lost") && b.class.forgotten.get());
    b.frontend(XenbusState::Connected);
    b.succeed(Some("record-missing"));
    assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::Connected));
}

#[test]
fn session_that_ends_before_it_was_announced_is_not_taken_for_one_that_was_never_served() {
    for shut_down in [false, true] {
        let mut b = Bench::new(HotplugMode::Plain);
        b.slow(&["connect", "disconnect"]);
        b.frontend(XenbusState::Connected);
        assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::InitWait));
        if shut_down {
            assert_eq!(b.driver.shut_down(&mut b.world.back).unwrap(), Poll::Pending);
        } else {
            b.class.fails.set(true);
            assert_eq!(b.step(), Life::Alive);
        }
        assert!(b.class.connected.get(), "its record is there");
        assert_eq!(b.state(), XenbusState::Closing, "before the record goes");
    }
}
