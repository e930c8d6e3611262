//! A confined process tries what it must not do. Each attempt runs in a child process, which is this
//! program again: it has one thread, and a system call filter may kill it.
#![allow(missing_docs, reason = "tests")]
#![forbid(unsafe_code)]

#[path = "confined/attempts.rs"]
mod attempts;
#[path = "confined/child.rs"]
mod child;
#[path = "confined/devices.rs"]
mod devices;
#[path = "confined/helper.rs"]
mod helper;
#[path = "confined/parent.rs"]
mod parent;
#[path = "confined/reported.rs"]
mod reported;

use libtest_mimic::{Arguments, Trial};
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    if args.next().as_deref() == Some(child::ARGUMENT) {
        return child::run(args.next().as_deref().unwrap_or_default());
    }
    let trials = devices::TESTS.iter().chain(helper::TESTS).chain(reported::TESTS);
    let trials = trials.map(|(name, test)| {
        Trial::test(*name, move || {
            test();
            Ok(())
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}
