//! A device process that was taken over: hostile code runs on a thread of a process that serves a
//! disk and is confined, and tries what it must not do.
//!
//! The processes of the supervisor are this program again. It runs the same function as
//! `pvio process hosted disk`, and starts a thread when the session was resumed: after the layers were
//! applied, before the system calls are restricted, as the threads of the queues.
#![allow(missing_docs, reason = "tests")]
#![forbid(unsafe_code)]

#[path = "attacked/attempts.rs"]
mod attempts;
#[path = "attacked/machine.rs"]
mod machine;
#[path = "attacked/process.rs"]
mod process;

use attempts::{ATTEMPTS, Expected};
use libtest_mimic::{Arguments, Trial};
use machine::{Machine, Seen};
use std::ffi::OsStr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::process::ExitCode;
use std::time::Duration;

macro_rules! named {
    ($test:ident) => {
        (stringify!($test), $test)
    };
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|first| first == process::ARGUMENT) {
        return process::run(&args[1..]);
    }
    let tests: [(&str, fn()); 5] = [
        named!(hostile_code_in_confined_process_reaches_nothing_and_guest_goes_on),
        named!(process_that_truncates_its_record_ends_only_its_own_session),
        named!(disk_whose_path_is_not_utf8_is_served_by_a_process),
        named!(image_helper_that_dies_is_started_again),
        named!(supervisor_without_xenstore_replaces_a_process_and_sees_later_what_it_missed),
    ];
    let trials = tests.map(|(name, test)| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
    });
    let mut arguments = Arguments::from_args();
    // The tests stop their supervisor by a signal to this process.
    arguments.test_threads = Some(1);
    libtest_mimic::run(&arguments, trials.into()).exit_code()
}

fn hostile_code_in_confined_process_reaches_nothing_and_guest_goes_on() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: a supervisor that is not root cannot change the user of its processes");
        return;
    }
    let machine = Machine::start(1);
    let mut disk = machine.attach(0);
    disk.verify();
    // Hostile code starts in processes that resume a session.
    machine.kill_process(0);
    // The successor serves once it is confined.
    disk.verify();
    for (name, expected) in ATTEMPTS {
        let seen = machine.attempt(0, name, || disk.verify());
        println!("{name:<24} {seen:?}");
        match expected {
            Expected::Killed => assert_eq!(seen, Seen::Ended("signal 31".into()), "{name}"),
            Expected::Error(errno) => assert_eq!(seen, Seen::Outcome(*errno), "{name}"),
        }
        disk.verify();
    }
    let killed =
        ATTEMPTS.iter().filter(|(_, expected)| matches!(expected, Expected::Killed)).count();
    assert_eq!(machine.replaced(0), killed as u64 + 1);
    disk.close();
    machine.end();
}

fn process_that_truncates_its_record_ends_only_its_own_session() {
    let machine = Machine::start(2);
    let (mut disk, mut other) = (machine.attach(0), machine.attach(1));
    disk.verify();
    machine.kill_process(0);
    disk.verify();
    // Growing an image needs this call.
    assert_eq!(machine.attempt(0, "truncate-record", || ()), Seen::Outcome(0));
    machine.kill(0);
    let why = machine.error_of(0);
    assert!(why.contains("record-") || why.contains("device-process"), "{why}");
    other.verify();
    machine.kill_process(1);
    other.verify();
    other.close();
    machine.end();
}

fn disk_whose_path_is_not_utf8_is_served_by_a_process() {
    let machine = Machine::start_as(1, 0, |image, dir| {
        let named = dir.join(OsStr::from_bytes(b"\xff\xfe.img"));
        std::fs::hard_link(image, &named).unwrap();
        named.into_os_string().into_vec()
    });
    let mut disk = machine.attach(0);
    disk.verify();
    // Its successor opens the same path.
    machine.kill_process(0);
    disk.verify();
    assert_eq!(machine.replaced(0), 1);
    disk.close();
    machine.end();
}

fn image_helper_that_dies_is_started_again() {
    let machine = Machine::start_with(1, 2);
    let mut disk = machine.attach(0);
    disk.verify();
    assert_eq!(machine.helper_deaths_left(), 0);
    disk.close();
    machine.end();
    let machine = Machine::start_with(1, 100);
    let why = machine.error_of(0);
    assert!(why.contains("image-helper") && why.contains("signal 9"), "{why}");
    assert_eq!(machine.helper_deaths_left(), 97);
    machine.end();
}

fn supervisor_without_xenstore_replaces_a_process_and_sees_later_what_it_missed() {
    let machine = Machine::start(2);
    let (mut disk, mut other) = (machine.attach(0), machine.attach(1));
    disk.verify();
    other.verify();
    for _ in 0..2 {
        let lost = machine.lose_xenstore(Duration::from_millis(700));
        for _ in 0..20 {
            disk.verify();
        }
        // A successor serves although there is no xenstore.
        machine.kill(0);
        disk.verify();
        assert!(!lost.is_finished(), "the test takes longer than the connection is lost");
        lost.join().unwrap();
        disk.verify();
    }
    let lost = machine.lose_xenstore(Duration::from_millis(300));
    // The backend closes the disk when it is connected again.
    other.close();
    lost.join().unwrap();
    disk.verify();
    disk.close();
    machine.end();
}
