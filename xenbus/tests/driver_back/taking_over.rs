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
fn request_not_taken_by_dead_backend_is_connected_by_successor() {
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
fn session_served_before_state_was_written_is_resumed_and_announced() {
    for front in REQUESTED {
        let mut b = interrupted(front, None);
        b.world.dom0.rm(&format!("{}/offered", b.back)).unwrap();
        assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::Connected), "{front}");
        assert!(b.class.connected.get() && !b.class.forgotten.get());
        assert!(b.has("described") && !b.has("offered"));
    }
}

#[test]
fn session_with_unusable_record_is_marked_lost() {
    for why in ["record-file", "record-version", "record-size"] {
        let mut b = interrupted(XenbusState::Connected, Some(why));
        assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::InitWait), "{why}");
        assert!(!b.class.connected.get() && !b.class.forgotten.get());
        assert!(b.has("pvio-session-lost"));
    }
}

#[test]
fn lost_session_is_not_connected_by_any_backend_until_frontend_restarts() {
    let mut b = Bench::connected();
    for unresumable in [Some("record-missing"), Some("record-missing"), None] {
        b.succeed(unresumable);
        assert_eq!((b.step(), b.state()), (Life::Alive, XenbusState::InitWait));
        assert!(!b.class.connected.get(), "lost session was connected");
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
fn session_ended_before_announcement_is_not_treated_as_unserved() {
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
        assert!(b.class.connected.get(), "record still exists");
        assert_eq!(
            b.state(),
            XenbusState::Closing,
            "state Closing is written before the record is removed"
        );
    }
}
