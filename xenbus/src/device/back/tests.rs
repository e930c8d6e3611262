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
        assert!(done.len() <= 4, "no end: {done:?}");
    }
}

fn connected() -> BackendMachine {
    let mut m = BackendMachine::resuming();
    assert_eq!(settle(&mut m, S::Connected, true), [BackAction::Resume]);
    m
}

#[test]
fn a_session_is_taken_over_only_if_the_frontend_still_has_it() {
    assert_eq!(settle(&mut connected(), S::Connected, true), []);
    let mut m = BackendMachine::resuming();
    assert_eq!(settle(&mut m, S::Initialising, true), [BackAction::WriteOffer]);
    assert_eq!(settle(&mut m, S::Connected, true), [BackAction::Connect]);
    let mut m = BackendMachine::resuming();
    assert_eq!(settle(&mut m, S::Connected, false), [BackAction::Close], "it is to go");
    let mut m = BackendMachine::resuming();
    assert_eq!(m.decide(S::Connected, true), BackAction::Resume);
    m.failed();
    assert_eq!(settle(&mut m, S::Connected, true), [BackAction::Close]);
    assert_eq!(settle(&mut m, S::Connected, true), []);
}

#[test]
fn a_session_that_cannot_be_taken_over_waits_for_the_frontend_to_start_over() {
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
fn frontend_that_was_never_served_is_connected_and_one_that_was_served_is_resumed() {
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
fn a_device_lives_and_ends() {
    let mut m = BackendMachine::new();
    assert_eq!(settle(&mut m, S::Initialising, true), [BackAction::WriteOffer]);
    assert_eq!(settle(&mut m, S::Initialised, true), [BackAction::Connect]);
    assert_eq!(settle(&mut m, S::Connected, true), []);
    assert_eq!(settle(&mut m, S::Connected, false), [BackAction::StartClosing]);
    assert!(m.is_connected(), "the frontend may still finish");
    assert_eq!(settle(&mut m, S::Closing, false), []);
    let end = [BackAction::Disconnect, BackAction::Close, BackAction::Remove];
    assert_eq!(settle(&mut m, S::Closed, false), end);
    for front in S::ALL {
        assert_eq!(settle(&mut m, front, true), []);
    }
}

#[test]
fn state_three_is_optional_and_so_is_waiting_for_the_offer() {
    let mut m = BackendMachine::new();
    assert_eq!(settle(&mut m, S::Connected, true), [BackAction::WriteOffer, BackAction::Connect]);
}

#[test]
fn a_frontend_that_starts_anew_is_offered_again() {
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
fn a_frontend_whose_new_start_went_unseen_is_connected_anew() {
    let again = [BackAction::Disconnect, BackAction::WriteOffer, BackAction::Connect];
    let mut m = connected();
    assert_eq!(settle(&mut m, S::Initialised, true), again, "4, then 3 after an unseen 1");
    assert_eq!(settle(&mut m, S::Initialised, true), []);
    assert_eq!(settle(&mut m, S::Connected, true), []);
    m.superseded();
    assert_eq!(settle(&mut m, S::Connected, true), again, "4 with other keys");
    assert_eq!(settle(&mut m, S::Connected, true), []);
    m.superseded();
    let gone = [BackAction::Disconnect, BackAction::Close];
    assert_eq!(settle(&mut m, S::Initialised, false), gone, "it is to go");
    m.superseded();
    assert_eq!(settle(&mut m, S::Connected, false), [], "there is no session");
}

#[test]
fn a_frontend_with_bad_keys_is_not_tried_in_a_loop() {
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
fn a_restarted_backend_waits_for_the_frontend_to_start_over() {
    let mut m = BackendMachine::restarted();
    assert_eq!(settle(&mut m, S::Connected, true), [BackAction::WriteOffer]);
    assert_eq!(settle(&mut m, S::Connected, true), []);
    assert_eq!(settle(&mut m, S::Initialising, true), []);
    assert_eq!(settle(&mut m, S::Connected, true), [BackAction::Connect]);
    let mut m = BackendMachine::restarted();
    let at_once = [BackAction::WriteOffer, BackAction::Connect];
    assert_eq!(settle(&mut m, S::Initialised, true), at_once, "its rings were never used");
}

#[test]
fn a_frontend_reconfigures_as_often_as_it_likes() {
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
fn a_frontend_that_reconfigures_over_a_restart_is_answered() {
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
    assert_eq!(settle(&mut m, S::Reconfiguring, false), [BackAction::Close], "it is to go");
}

#[test]
fn a_frontend_that_is_not_there_yet_is_waited_for() {
    let mut m = BackendMachine::new();
    assert_eq!(settle(&mut m, S::Unknown, true), [BackAction::WriteOffer]);
    assert_eq!(settle(&mut m, S::Initialising, true), []);
    assert_eq!(settle(&mut m, S::Unknown, true), [BackAction::Close], "it went");
    let mut m = BackendMachine::new();
    assert_eq!(settle(&mut m, S::Unknown, true), [BackAction::WriteOffer]);
    let end = [BackAction::Close, BackAction::Remove];
    assert_eq!(settle(&mut m, S::Unknown, false), end, "nobody ever came");
}

#[test]
fn a_device_that_is_to_go_does_not_come_back() {
    let mut m = BackendMachine::new();
    settle(&mut m, S::Initialising, true);
    assert_eq!(settle(&mut m, S::Initialised, false), [BackAction::Close]);
    assert_eq!(settle(&mut m, S::Initialising, false), [BackAction::Remove]);
}

#[test]
fn a_vanished_frontend_lets_go_and_a_vanished_backend_removes() {
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
    fn any_order_of_states_settles_and_repeats_do_nothing(
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
