//! pvio's frontend and backend together in one thread: requests of the guest over the control ring,
//! in its transmit ring and through xenstore, and which of them stay in force when a backend is
//! restarted.

#[path = "nic/connecting.rs"]
mod connecting;
#[path = "nic/world.rs"]
mod world;

use pvio_netback::fault::DropReason;
use pvio_netback::queue::STAGED_MAX;
use pvio_netfront::{Hash, Hearing, Nic, Steering, SteeringState};
use pvio_ring::proto::netif::{HashTypes, hash_frame};
use pvio_ring::shm::Region;
use pvio_sim::LocalDomain;
use pvio_xenbus::handshake::common::{read_error, read_state};
use pvio_xenbus::handshake::vif::{read_multicast_request, read_xdp_headroom};
use pvio_xenbus::{XenbusState, Xenstore};
use std::sync::atomic::Ordering::Relaxed;
use world::{GROUP, OTHER, World, to_group, udp};

const KEY: [u8; 40] = [0x6d; 40];
const QUEUES: u32 = 3;

fn steering() -> Steering {
    Steering::new(HashTypes::all(), &KEY).unwrap()
}

/// Returns a NIC that requests every feature.
fn all(nic: Nic<LocalDomain>) -> Nic<LocalDomain> {
    let mut nic =
        nic.with_queues(QUEUES).steered_by(steering()).choosing_groups().with_headroom(256);
    nic.join(GROUP).unwrap();
    nic
}

/// Checks that everything that `all` requests is in force, by the packets that arrive.
fn assert_all(w: &mut World, headroom: usize) {
    let nic = w.nic();
    assert_eq!(nic.steering(), SteeringState::On);
    assert_eq!(nic.hearing(), Hearing::Joined);
    assert_eq!(usize::from(nic.headroom_given()), headroom);
    assert_eq!((nic.fault(), nic.has_news(), nic.is_settled()), (None, false, true));
    let frames: Vec<_> = (0..30).map(udp).collect();
    let mut used = [0; QUEUES as usize];
    for frame in &frames {
        let (kind, value) = hash_frame(frame, HashTypes::all(), &KEY).unwrap();
        let to = (value % 128 % QUEUES) as usize;
        used[to] += 1;
        let got = w.receive(frame);
        assert_eq!(got, [(to, frame.clone(), Some(Hash { kind, value }), headroom)]);
    }
    assert!(used.iter().all(|count| *count > 0), "{used:?}");
    assert_eq!(w.receive(&to_group(GROUP)).len(), 1);
    assert_eq!(w.receive(&to_group(OTHER)).len(), 0);
    assert_eq!(w.receive(&to_group([0xff; 6])).len(), 1);
}

#[test]
fn requested_settings_apply_at_connect_and_after_backend_restart() {
    let mut w = World::new(QUEUES, all);
    for session in 1..4 {
        w.settle();
        assert_eq!(w.nic().sessions(), session);
        assert_all(&mut w, 256);
        assert_eq!(w.nic().staged(), QUEUES as usize * STAGED_MAX);
        assert_eq!(w.staged(), QUEUES as usize * STAGED_MAX);
        w.restart();
    }
    assert_eq!(w.dropped(DropReason::RxTooBig), 0);
}

#[test]
fn rate_key_limits_all_queues_of_vif_together() {
    let mut w = World::new(QUEUES, |nic| nic.with_queues(QUEUES));
    let rate = format!("{}/rate", w.addr.backend_path());
    // A burst, and nearly nothing after it.
    w.tool.write(&rate, b"1,1000000").unwrap();
    w.settle();
    assert_eq!(w.nic().queues().len(), QUEUES as usize);
    let bytes = w.flood();
    assert!((131_072..=132_072).contains(&bytes), "{bytes}");
}

#[test]
fn settings_changed_while_connected_take_effect_and_revert() {
    let mut w = World::new(QUEUES, |nic| nic.with_queues(QUEUES));
    w.settle();
    let frame = udp(1);
    assert_eq!(w.receive(&frame), [(0, frame.clone(), None, 0)]);
    assert_eq!(w.receive(&to_group(OTHER)).len(), 1);
    let nic = w.nic();
    let states = (nic.steering(), nic.hearing(), nic.headroom_given());
    assert_eq!(states, (SteeringState::Off, Hearing::All, 0));
    for round in 0..3 {
        let nic = w.nic();
        nic.steer(Some(steering()));
        nic.join(GROUP).unwrap();
        nic.filter_groups(true);
        nic.ask_headroom(700);
        assert_eq!((nic.hearing(), nic.has_news()), (Hearing::All, true));
        assert_eq!(nic.steering(), SteeringState::Pending);
        w.settle();
        assert_all(&mut w, 700);
        assert_eq!(w.front_state(), XenbusState::Connected, "round {round}");
        // Changes one setting at a time, and then reverts them.
        w.nic().steer(Some(steering().with_table(&[2, 2]).unwrap()));
        w.settle();
        assert_eq!(w.receive(&frame)[0].0, 2);
        w.nic().join(OTHER).unwrap();
        w.settle();
        assert_eq!(w.receive(&to_group(OTHER)).len(), 1);
        assert!(w.nic().leave(OTHER));
        w.settle();
        assert_eq!(w.receive(&to_group(OTHER)).len(), 0);
        let nic = w.nic();
        nic.steer(None);
        nic.filter_groups(false);
        nic.ask_headroom(0);
        w.settle();
        assert_eq!(w.receive(&frame), [(0, frame.clone(), None, 0)]);
        assert_eq!(w.receive(&to_group(OTHER)).len(), 1);
    }
    assert_eq!(w.nic().fault(), None);
}

#[test]
fn second_headroom_change_while_backend_is_reconfigured_takes_effect() {
    let mut w = World::new(1, |nic| nic);
    w.settle();
    w.nic().ask_headroom(100);
    w.step_front();
    assert_eq!(w.front_state(), XenbusState::Reconfiguring);
    w.step_back();
    w.step_front();
    assert_eq!((w.front_state(), w.nic().headroom_given()), (XenbusState::Connected, 100));
    // Its backend is still Reconfigured.
    w.nic().ask_headroom(200);
    w.step_front();
    assert_eq!(w.nic().headroom_given(), 200);
    w.settle();
    assert_eq!(w.receive(&udp(1))[0].3, 200);
}

#[test]
fn session_taken_over_keeps_guest_settings() {
    let mut w = World::new(QUEUES, all);
    w.settle();
    assert_all(&mut w, 256);
    let all = QUEUES as usize * STAGED_MAX;
    for _ in 0..2 {
        w.take_over();
        w.step_back();
        assert_eq!(w.staged(), all, "pages are staged before the first packet");
        w.settle();
        assert_eq!(w.nic().sessions(), 1, "the guest keeps its session");
        assert_all(&mut w, 256);
    }
    // A change is recorded before its response is visible.
    w.nic().steer(Some(steering().with_table(&[1]).unwrap()));
    w.nic().join(OTHER).unwrap();
    w.settle();
    w.take_over();
    w.settle();
    assert_eq!(w.receive(&udp(1))[0].0, 1);
    assert_eq!(w.receive(&to_group(OTHER)).len(), 1);
    w.nic().steer(None);
    assert!(w.nic().leave(OTHER));
    w.settle();
    w.take_over();
    w.settle();
    assert_eq!(w.receive(&udp(1))[0].2, None);
    assert_eq!(w.receive(&to_group(OTHER)).len(), 0);
    w.nic().unstage();
    w.settle();
    assert_eq!((w.nic().staged(), w.nic().not_unstaged(), w.staged()), (0, 0, 0));
    w.take_over();
    w.settle();
    assert_eq!(w.staged(), 0);
    // A new session starts with default settings.
    w.nic().filter_groups(false);
    w.nic().leave(GROUP);
    w.restart();
    w.settle();
    assert_eq!((w.nic().sessions(), w.receive(&to_group(OTHER)).len()), (2, 1));
}

#[test]
fn session_taken_over_keeps_features_of_first_offer() {
    let mut w = World::new(QUEUES, all);
    w.settle();
    // An offer as an earlier version would make it.
    let base = w.addr.backend_path();
    w.tool.write(&format!("{base}/feature-gso-tcpv4"), b"0").unwrap();
    let first = w.negotiated();
    for queues in [1, 8, 1] {
        w.offer_queues(queues);
        w.take_over();
        w.settle();
        assert_eq!(w.nic().sessions(), 1, "the guest keeps its session");
        let mut expected = first.clone();
        expected.to_back.gso_v4 = false;
        // Requested by the guest since then.
        expected.multicast_control = true;
        assert_eq!(w.negotiated(), expected);
        assert_all(&mut w, 256);
    }
    w.restart();
    w.settle();
    assert_eq!(
        (w.nic().sessions(), w.nic().queues().len()),
        (2, 1),
        "number of queues of the new offer"
    );
    assert!(w.negotiated().to_back.gso_v4);
}

#[test]
fn frontend_waiting_for_dead_backend_is_connected_by_its_offer() {
    let mut w = World::new(QUEUES, all);
    w.step_back();
    w.step_front();
    w.offer_queues(1);
    w.restart();
    w.settle();
    assert_eq!((w.nic().sessions(), w.nic().queues().len()), (1, QUEUES as usize));
    assert_all(&mut w, 256);
}

#[test]
fn session_without_valid_record_reconnects() {
    type Change = fn(&mut World);
    let changes: [Change; 3] = [
        World::forget_records,
        // The record is not valid.
        |w| assert!(w.records()[0].store_u64(0, 0, Relaxed)),
        // The record is another frontend's, or another session's.
        |w| assert!(w.records()[0].store_u64(64 + 3 * 8, 77, Relaxed)),
    ];
    for change in changes {
        let mut w = World::new(QUEUES, all);
        w.settle();
        change(&mut w);
        w.take_over();
        w.settle();
        assert_eq!(w.nic().sessions(), 2, "the frontend starts a new session");
        assert_all(&mut w, 256);
        w.take_over();
        w.settle();
        assert_eq!(w.nic().sessions(), 2, "the session has a valid record");
    }
}

#[test]
fn session_with_record_contradicting_rings_is_closed_with_reason() {
    // The sections of the queues' rings are last in the record, here the receive ring's; the
    // control ring's section is before them.
    let receive = 64 + 256 * (8 + 8);
    for (back, reason) in [(receive, "record-numbers"), (receive - 8, "record-numbers")] {
        let mut w = World::new(1, all);
        w.settle();
        assert!(w.records()[0].store_u64(w.record_len() - back, 9999, Relaxed));
        w.take_over();
        w.step_back();
        let back = w.addr.backend_path();
        assert_eq!(read_state(&mut w.tool, &back).unwrap(), XenbusState::Closed);
        let error = read_error(&mut w.tool, &back).unwrap().expect("a reason");
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn staged_pages_are_unmapped_before_close_and_staged_again_on_restart() {
    let mut w = World::new(2, |nic| nic.with_queues(2));
    w.settle();
    assert_eq!(w.staged(), 2 * STAGED_MAX);
    w.nic().unstage();
    assert!(!w.nic().is_settled());
    w.settle();
    let nic = w.nic();
    assert_eq!((nic.is_settled(), nic.staged(), nic.not_unstaged()), (true, 0, 0));
    assert_eq!(w.staged(), 0);
    assert_eq!(w.receive(&udp(1)).len(), 1, "packet is received by grant copy");
    w.close();
    assert!(w.front_is_closed());
    // In a new session, the pages are staged again.
    let mut w = World::new(2, |nic| nic.with_queues(2));
    w.settle();
    w.nic().unstage();
    w.settle();
    w.restart();
    w.settle();
    assert_eq!((w.nic().sessions(), w.staged()), (2, 2 * STAGED_MAX));
}

/// The test acts as the backend: it writes these values and nothing else.
mod hostile_backends {
    use super::*;
    use pvio_xenbus::handshake::vif::BackOffer;

    fn offer() -> BackOffer {
        BackOffer {
            rx_copy: true,
            multicast_control: true,
            dynamic_multicast_control: true,
            ctrl_ring: true,
            xdp_headroom: true,
            max_queues: Some(2),
            ..BackOffer::default()
        }
    }

    fn connected(offer: &BackOffer) -> World {
        let mut w = World::new(2, |nic| all(nic).with_queues(2));
        w.says(offer, XenbusState::InitWait);
        w.says_state(XenbusState::Connected);
        assert_eq!(w.front_state(), XenbusState::Connected);
        w
    }

    #[test]
    fn features_not_advertised_are_not_requested() {
        let none = BackOffer { rx_copy: true, ..BackOffer::default() };
        let mut w = connected(&none);
        let front = w.addr.frontend_path();
        assert_eq!(read_xdp_headroom(&mut w.tool, &front).unwrap(), 0);
        assert!(!read_multicast_request(&mut w.tool, &front).unwrap());
        assert_eq!(w.tool.read_opt(&format!("{front}/ctrl-ring-ref")).unwrap(), None);
        let nic = w.nic();
        assert_eq!(nic.steering(), SteeringState::NotOffered);
        assert_eq!(nic.hearing(), Hearing::NotOffered);
        assert_eq!((nic.headroom_given(), nic.has_news(), nic.is_settled()), (0, false, true));
        nic.ask_headroom(12);
        assert!(!nic.has_news());
        assert_eq!(nic.queues().len(), 1);
    }

    #[test]
    fn multicast_control_without_dynamic_feature_is_requested_at_connect() {
        let old = BackOffer { dynamic_multicast_control: false, ..offer() };
        let mut w = connected(&old);
        let front = w.addr.frontend_path();
        assert!(read_multicast_request(&mut w.tool, &front).unwrap());
        assert_eq!((w.nic().hearing(), w.nic().has_news()), (Hearing::Joined, false));
        w.nic().filter_groups(false);
        assert!(!w.nic().has_news(), "change without dynamic multicast control is not requested");
        w.step_front();
        assert!(read_multicast_request(&mut w.tool, &front).unwrap());
        // If they can be chosen later, it happens only after the backend has connected, and this
        // one does not respond.
        let mut w = connected(&offer());
        w.nic().queues();
        w.step_front();
        assert!(!read_multicast_request(&mut w.tool, &front).unwrap());
        assert_eq!(w.nic().hearing(), Hearing::All);
    }

    #[test]
    fn backend_that_ignores_reconfiguration_does_not_block_session() {
        let mut w = connected(&offer());
        w.nic().ask_headroom(1000);
        for _ in 0..5 {
            w.step_front();
        }
        assert_eq!(w.front_state(), XenbusState::Reconfiguring);
        assert_eq!(w.nic().headroom_given(), 256);
        let nic = w.nic();
        assert!(nic.is_connected() && nic.queues().len() == 2);
        nic.queue().unwrap().send(&[1; 60], pvio_netfront::Checksum::Unknown).unwrap();
        // A second change waits for the first one. The session ends as usual.
        w.nic().ask_headroom(0);
        w.step_front();
        assert_eq!(w.front_state(), XenbusState::Reconfiguring);
        w.start_closing();
        w.says_state(XenbusState::Closing);
        w.says_state(XenbusState::Closed);
        assert!(w.front_is_closed());
    }

    #[test]
    fn backend_state_storm_leaves_frontend_connected() {
        use XenbusState as S;
        for (storm, then) in [
            (vec![S::Reconfigured, S::Connected], S::Connected),
            (vec![S::Reconfiguring, S::Reconfigured, S::Reconfiguring], S::Connected),
            (vec![S::Unknown, S::Reconfigured], S::Connected),
        ] {
            let mut w = connected(&offer());
            let path = w.addr.frontend_path();
            for _ in 0..100 {
                for state in &storm {
                    w.says_state(*state);
                }
            }
            assert_eq!(w.front_state(), then, "{storm:?}");
            assert_eq!(w.nic().sessions(), 1);
            assert_eq!(read_error(&mut w.tool, &path).unwrap(), None);
        }
        // The backend restarts during a change, and offers less.
        let mut w = connected(&offer());
        w.nic().ask_headroom(77);
        w.step_front();
        let less = BackOffer { rx_copy: true, ..BackOffer::default() };
        w.says(&less, XenbusState::InitWait);
        w.says_state(XenbusState::Connected);
        assert_eq!(w.nic().sessions(), 2);
        assert_eq!((w.nic().headroom_given(), w.nic().has_news()), (0, false));
        w.says(&offer(), XenbusState::InitWait);
        let front = w.addr.frontend_path();
        assert_eq!(
            read_xdp_headroom(&mut w.tool, &front).unwrap(),
            77,
            "headroom is requested with the new offer"
        );
    }

    #[test]
    fn frontend_without_write_permission_closes_nic() {
        let mut w = connected(&offer());
        // The toolstack removed the frontend's write permission for its directory.
        w.take_rights();
        w.nic().ask_headroom(5);
        w.step_front();
        assert_ne!(w.front_state(), XenbusState::Connected);
        assert!(!w.nic().is_connected());
    }
}
