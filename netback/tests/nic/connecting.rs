//! The backend's process ends at any moment of connecting.

use super::*;
use pvio_netback::vif::Attach;
use pvio_sim::kill::run;

/// Driver of the frontend. pvio's writes a key while it waits for its backend; Linux's does not.
#[derive(Clone, Copy, Debug)]
enum Frontend {
    Pvio,
    Linux,
}

/// Connects until the session has carried a frame in each direction. The guest sends as early as
/// possible.
fn connect(w: &mut World, frontend: Frontend) {
    w.step_back();
    w.step_front();
    if matches!(frontend, Frontend::Linux) {
        w.show_no_waiting();
    }
    send(w);
    w.step_back();
    w.settle_rings();
    w.step_front();
    w.receive(&udp(1));
    w.step_back();
}

fn send(w: &mut World) {
    for queue in w.nic().queues() {
        queue.send(&udp(2), pvio_netfront::Checksum::Unknown).unwrap();
        queue.publish().unwrap();
    }
}

#[test]
fn backend_killed_at_any_step_of_connecting_leaves_one_working_session() {
    for frontend in [Frontend::Pvio, Frontend::Linux] {
        let (mut left, mut moment) = (Vec::new(), 0);
        loop {
            let mut w = World::new(2, |nic| all(nic).with_queues(2));
            if run(moment, || connect(&mut w, frontend)).0.is_some() {
                println!("{frontend:?}: died at {moment} moments, leaving {left:?}");
                break;
            }
            let state = w.back_state();
            if left.last().is_none_or(|(last, _)| *last != state) {
                left.push((state, 0));
            }
            left.last_mut().unwrap().1 += 1;
            // `tests/killed` covers every moment of a session.
            moment += if state == XenbusState::Connected { 11 } else { 1 };
            w.take_over();
            w.settle();
            let what = format!("{frontend:?}, killed before moment {moment}, {state}");
            assert_eq!(w.back_state(), XenbusState::Connected, "{what}");
            assert_eq!(w.nic().queues().len(), 2, "{what}");
            assert_eq!(w.nic().sessions(), 1, "{what}");
            // Every request gets a response: more frames than a ring has slots can be sent.
            for _ in 0..10 {
                (0..32).for_each(|_| send(&mut w));
                w.settle_rings();
                assert_eq!(w.nic().fault(), None, "{what}");
            }
            // A frame that the killed backend had delivered may arrive first.
            let got = w.receive(&to_group(GROUP));
            assert_eq!(got.last().map(|got| &got.1), Some(&to_group(GROUP)), "{what}");
            assert_eq!(w.receive(&to_group(OTHER)), [], "{what}");
        }
        assert!(left.iter().any(|(state, count)| *state == XenbusState::InitWait && *count > 20));
    }
}

#[test]
fn nic_with_lost_session_is_not_connected_before_guest_restarts() {
    let mut w = World::new(QUEUES, all);
    w.settle();
    w.forget_records();
    for _ in 0..3 {
        w.take_over();
        w.step_back();
        assert_eq!((w.back_state(), w.served()), (XenbusState::InitWait, 0));
    }
    w.settle();
    assert_eq!(w.nic().sessions(), 2);
    assert_all(&mut w, 256);
}

#[test]
fn port_set_up_by_script_of_dead_process_is_attached_by_successor() {
    // The backend ends while it connects, in a session, and in a session whose record is lost.
    for (connected, lost) in [(false, false), (true, false), (true, true)] {
        let mut w = World::new(1, |nic| nic).with_script();
        w.step_back();
        w.step_front();
        w.step_back();
        assert_eq!((w.attached(), w.back_state()), (Some(Attach::ByScript), XenbusState::InitWait));
        w.script_is_done();
        if connected {
            w.settle();
            assert_eq!(w.back_state(), XenbusState::Connected);
        }
        if lost {
            w.forget_records();
        }
        w.take_over();
        w.settle();
        assert_eq!((w.attached(), w.back_state()), (Some(Attach::Here), XenbusState::Connected));
        assert_eq!(w.receive(&udp(1)).len(), 1);
    }
    // The script has not run yet: it finds the successor's port.
    let mut w = World::new(1, |nic| nic).with_script();
    w.step_back();
    w.take_over();
    w.step_back();
    assert_eq!(w.attached(), Some(Attach::ByScript));
}
