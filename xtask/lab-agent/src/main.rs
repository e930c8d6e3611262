//! `/init` of every domain of the real-Xen lab, and the lab's scenarios.
//!
//! One statically linked program has all roles; its name and first argument select the role.
//!
//! | called as | role |
//! |---|---|
//! | process 1 | [`init`]: mounts file systems, starts the agent of the domain, reaps, powers off |
//! | `… dom0` | [`dom0`]: boots dom0 and runs the scenarios that the host requests |
//! | `… guest` | [`guest`]: executes requests that dom0 sends over the guest's console |
//! | `block`, `vif-bridge` | [`hotplug`]: scripts that `xl` runs when a device is added or removed |
//! | `… list` | on any machine: the table of [`scenarios`], as JSON |
//!
//! [`link`] is the protocol between dom0 and a guest, [`net`] traffic between them, [`sys`]
//! functions that the standard library lacks, [`pattern`] reproducible test data.
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
