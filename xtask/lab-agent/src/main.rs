//! `/init` of every domain of the real-Xen lab, and the lab's scenarios.
//!
//! One program, linked without shared libraries, plays every part; which one it plays is decided
//! by how it is called.
//!
//! | called as | is |
//! |---|---|
//! | process 1 | [`init`]: mounts, starts the domain's part, reaps, powers off |
//! | `… dom0` | [`dom0`]: brings up a dom0 and runs the scenarios the host asked for |
//! | `… guest` | [`guest`]: does what dom0 asks for over the guest's console |
//! | `block`, `vif-bridge` | [`hotplug`]: what `xl` runs when a device comes or goes |
//! | `… list` | on any machine: the table of [`scenarios`], as JSON |
//!
//! [`link`] is how dom0 and a guest talk, [`net`] traffic between them, [`sys`] what the standard library lacks, [`pattern`] bytes
//! both can make up.
#![forbid(unsafe_code)]

mod dom0;
mod guest;
mod hotplug;
mod init;
mod link;
mod net;
mod pattern;
mod scenarios;
mod sys;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut words = std::env::args();
    let name = words.next().unwrap_or_default();
    let name = name.rsplit('/').next().unwrap_or_default();
    let words: Vec<String> = words.collect();
    let outcome = match (name, words.first().map(String::as_str)) {
        ("block" | "vif-bridge", Some(verb)) => hotplug::run(name, verb),
        _ if std::process::id() == 1 => init::run(),
        (_, Some("dom0")) => dom0::run(),
        (_, Some("guest")) => guest::run(),
        (_, Some("list")) => scenarios::print(),
        _ => Err(anyhow::anyhow!("the lab's /init: nothing to be run by hand, except `list`")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}
