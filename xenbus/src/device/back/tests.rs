use super::*;
use alloc::vec::Vec;
use proptest::prelude::*;

use XenbusState as S;

/// Carries out all actions and returns them; panics if there is no end.
fn settle(m: &mut BackendMachine, front: S, online: bool) -> Vec<BackAction> {
    let mut done = Vec::new();
    loop {
        let action = m.decide(front, online);
        if action == BackAction::None {
            return done;
        }
        m.done(action);
        done.push(action);
        assert!(done.len() <= 4, "state machine does not settle: {done:?}");
    }
}

fn connected() -> BackendMachine {
    let mut m = BackendMachine::resuming();
    assert_eq!(settle(&mut m, S::Connected, true), [BackAction::Resume]);
    m
}

#[test]
fn resuming_backend_resumes_only_if_frontend_is_connected() {
    assert_eq!(settle(&mut connected(), S::Connected, true), []);
    let mut m = BackendMachine::resuming();
    assert_eq!(settle(&mut m, S::Initialising, true), [BackAction::WriteOffer]);
    assert_eq!(settle(&mut m, S::Connected, true), [BackAction::Connect]);
    let mut m = BackendMachine::resuming();
    assert_eq!(settle(&mut m, S::Connected, false), [BackAction::Close], "device is offline");
    let mut m = BackendMachine::resuming();
    assert_eq!(m.decide(S::Connected, true), BackAction::Resume);
    m.failed();
    assert_eq!(settle(&mut m, S::Connected, true), [BackAction::Close]);
    assert_eq!(settle(&mut m, S::Connected, true), []);
}

#[test]
fn resuming_backend_without_session_waits_for_frontend_restart() {
    let mut m = BackendMachine::resuming();
    assert_eq!(m.decide(S::Connected, true), BackAction::Resume);
    m.abandon(true);
    assert!(m.is_stale());
    assert_eq!(settle(&mut m, S::Connected, true), [BackAction::WriteOffer]);
    assert_eq!(settle(&mut m, S::Connected, true), []);
    assert_eq!(settle(&mut m, S::Initialising, true), []);
    assert_eq!(settle(&mut m, S::Initialised, true), [BackAction::Connect]);
}

#[test]
fn interrupted_backend_resumes_served_and_connects_unserved_frontend() {
    for front in [S::Initialised, S::Connected] {
        let mut m = BackendMachine::interrupted();
        assert_eq!(settle(&mut m, front, true), [BackAction::Resume], "{front}");
        assert_eq!(settle(&mut m, S::Connected, true), []);
        let mut m = BackendMachine::interrupted();
        assert_eq!(m.decide(front, true), BackAction::Resume);
        m.abandon(false);
        let connects = [BackAction::WriteOffer, BackAction::Connect];
        assert_eq!(settle(&mut m, front, true), connects, "{front}");
        assert!(!m.is_stale());
    }
    let mut m = BackendMachine::interrupted();
    assert_eq!(settle(&mut m, S::Initialising, true), [BackAction::WriteOffer]);
    assert_eq!(settle(&mut m, S::Initialised, true), [BackAction::Connect]);
}

#[test]
fn backend_follows_frontend_from_offer_to_removal() {
    let mut m = BackendMachine::new();
    assert_eq!(settle(&mut m, S::Initialising, true), [BackAction::WriteOffer]);
    assert_eq!(settle(&mut m, S::Initialised, true), [BackAction::Connect]);
    assert_eq!(settle(&mut m, S::Connected, true), []);
    assert_eq!(settle(&mut m, S::Connected, false), [BackAction::StartClosing]);
    assert!(m.is_connected(), "backend stays connected while closing");
    assert_eq!(settle(&mut m, S::Closing, false), []);
    let end = [BackAction::Disconnect, BackAction::Close, BackAction::Remove];
    assert_eq!(settle(&mut m, S::Closed, false), end);
    for front in S::ALL {
        assert_eq!(settle(&mut m, front, true), []);
    }
}

#[test]
fn frontend_that_skips_initialised_is_connected() {
    let mut m = BackendMachine::new();
    assert_eq!(settle(&mut m, S::Connected, true), [BackAction::WriteOffer, BackAction::Connect]);
}

#[test]
fn frontend_that_restarts_gets_new_offer() {
    // kexec without Closing.
    let mut m = connected();
    let again = [BackAction::Disconnect, BackAction::WriteOffer];
    assert_eq!(settle(&mut m, S::Initialising, true), again);
    assert_eq!(settle(&mut m, S::Initialising, true), []);
    // Orderly handover by a boot loader: 5, 6, 1.
    assert_eq!(settle(&mut m, S::Connected, true), [BackAction::Connect]);
    assert_eq!(settle(&mut m, S::Closing, true), [BackAction::StartClosing]);
    assert_eq!(settle(&mut m, S::Closed, true), [BackAction::Disconnect, BackAction::Close]);
    assert_eq!(settle(&mut m, S::Initialising, true), [BackAction::WriteOffer]);
    // 1 while the backend is still closing: 6 was not seen.
    assert_eq!(settle(&mut m, S::Initialised, true), [BackAction::Connect]);
    assert_eq!(settle(&mut m, S::Closing, true), [BackAction::StartClosing]);
    assert_eq!(settle(&mut m, S::Initialising, true), again);
    // 1 followed immediately by 3, after a 6: only 3 was seen.
    assert_eq!(settle(&mut m, S::Closed, true), [BackAction::Close]);
    assert_eq!(settle(&mut m, S::Initialised, true), [BackAction::WriteOffer, BackAction::Connect]);
}

#[test]
fn frontend_with_unseen_restart_is_reconnected() {
    let again = [BackAction::Disconnect, BackAction::WriteOffer, BackAction::Connect];
    let mut m = connected();
    assert_eq!(
        settle(&mut m, S::Initialised, true),
        again,
        "Initialised after an unseen Initialising"
    );
    assert_eq!(settle(&mut m, S::Initialised, true), []);
    assert_eq!(settle(&mut m, S::Connected, true), []);
    m.superseded();
    assert_eq!(settle(&mut m, S::Connected, true), again, "Connected with other keys");
    assert_eq!(settle(&mut m, S::Connected, true), []);
    m.superseded();
    let gone = [BackAction::Disconnect, BackAction::Close];
    assert_eq!(settle(&mut m, S::Initialised, false), gone, "device is offline");
    m.superseded();
    assert_eq!(settle(&mut m, S::Connected, false), [], "there is no session");
}

#[test]
fn frontend_with_bad_keys_is_closed_and_not_retried() {
    let mut m = BackendMachine::new();
    settle(&mut m, S::Initialising, true);
    assert_eq!(m.decide(S::Initialised, true), BackAction::Connect);
    m.failed();
    assert_eq!(settle(&mut m, S::Initialised, true), [BackAction::Close]);
    assert_eq!(settle(&mut m, S::Connected, true), []);
    assert_eq!(settle(&mut m, S::Initialising, true), [BackAction::WriteOffer]);
    assert_eq!(settle(&mut m, S::Initialised, true), [BackAction::Connect]);
}

#[test]
fn restarted_backend_waits_for_connected_frontend_to_restart() {
    let mut m = BackendMachine::restarted();
    assert_eq!(settle(&mut m, S::Connected, true), [BackAction::WriteOffer]);
    assert_eq!(settle(&mut m, S::Connected, true), []);
    assert_eq!(settle(&mut m, S::Initialising, true), []);
    assert_eq!(settle(&mut m, S::Connected, true), [BackAction::Connect]);
    let mut m = BackendMachine::restarted();
    let at_once = [BackAction::WriteOffer, BackAction::Connect];
    assert_eq!(
        settle(&mut m, S::Initialised, true),
        at_once,
        "unused rings are connected immediately"
    );
}

#[test]
fn frontend_reconfiguration_repeats_while_connected() {
    let mut m = connected();
    for _ in 0..2 {
        assert_eq!(settle(&mut m, S::Reconfiguring, true), [BackAction::Reconfigure]);
        assert_eq!((m.state(), m.is_connected()), (S::Reconfigured, true));
        assert_eq!(settle(&mut m, S::Reconfiguring, true), []);
        assert_eq!(settle(&mut m, S::Connected, true), [BackAction::Reconfigured]);
        assert_eq!(m.state(), S::Connected);
    }
    settle(&mut m, S::Reconfiguring, true);
    let end = [BackAction::Reconfigured, BackAction::StartClosing];
    assert_eq!(settle(&mut m, S::Connected, false), end);
    assert_eq!(settle(&mut BackendMachine::new(), S::Reconfiguring, true), []);
}

#[test]
fn reconfiguration_during_backend_restart_is_completed() {
    let mut m = BackendMachine::resuming();
    let over = [BackAction::Resume, BackAction::Reconfigure];
    assert_eq!(settle(&mut m, S::Reconfiguring, true), over);
    assert_eq!(settle(&mut m, S::Connected, true), [BackAction::Reconfigured]);
    let mut m = BackendMachine::restarted();
    assert_eq!(settle(&mut m, S::Reconfiguring, true), [BackAction::WriteOffer]);
    assert_eq!(settle(&mut m, S::Reconfiguring, true), []);
    assert_eq!(settle(&mut m, S::Initialising, true), []);
    assert_eq!(settle(&mut m, S::Initialised, true), [BackAction::Connect]);
    let mut m = BackendMachine::resuming();
    assert_eq!(settle(&mut m, S::Reconfiguring, false), [BackAction::Close], "device is offline");
}

#[test]
fn missing_frontend_gets_offer_and_closes_if_it_disappears() {
    let mut m = BackendMachine::new();
    assert_eq!(settle(&mut m, S::Unknown, true), [BackAction::WriteOffer]);
    assert_eq!(settle(&mut m, S::Initialising, true), []);
    assert_eq!(settle(&mut m, S::Unknown, true), [BackAction::Close], "frontend disappeared");
    let mut m = BackendMachine::new();
    assert_eq!(settle(&mut m, S::Unknown, true), [BackAction::WriteOffer]);
    let end = [BackAction::Close, BackAction::Remove];
    assert_eq!(settle(&mut m, S::Unknown, false), end, "no frontend appeared");
}

#[test]
fn offline_device_is_removed_and_not_offered_again() {
    let mut m = BackendMachine::new();
    settle(&mut m, S::Initialising, true);
    assert_eq!(settle(&mut m, S::Initialised, false), [BackAction::Close]);
    assert_eq!(settle(&mut m, S::Initialising, false), [BackAction::Remove]);
}

#[test]
fn vanished_frontend_disconnects_and_vanished_backend_is_removed() {
    let mut m = connected();
    assert_eq!(settle(&mut m, S::Unknown, true), [BackAction::Disconnect, BackAction::Close]);
    assert_eq!(settle(&mut m, S::Unknown, false), [BackAction::Remove]);
    let mut m = connected();
    assert_eq!(m.decide_gone(), BackAction::Disconnect);
    m.done(BackAction::Disconnect);
    assert_eq!(m.decide_gone(), BackAction::Remove);
    m.done(BackAction::Remove);
    assert_eq!(m.decide_gone(), BackAction::None);
}

proptest! {
    #[test]
    fn any_state_sequence_settles_and_repetition_is_no_action(
        steps in proptest::collection::vec((0_u32..9, any::<bool>(), 0_u8..8), 0..60)
    ) {
        let mut m = BackendMachine::new();
        for (front, online, luck) in steps {
            let front = S::from_number(front);
            match luck {
                0 => m.failed(),
                1 => m.superseded(),
                _ => {}
            }
            settle(&mut m, front, online);
            prop_assert_eq!(m.decide(front, online), BackAction::None);
            prop_assert!(!(m.is_connected() && m.state() == S::Closed));
            prop_assert!(!(m.is_connected() && front == S::Closed));
        }
    }
}
