//! The `pvio` command: the daemon of a driver domain on Xen, the toolstack commands for its devices,
//! and, with the feature `demo`, a hosted machine.
#![forbid(unsafe_code)]

mod cli;

use clap::Parser;
use cli::Cli;
use pvio_daemon::upgrade::handover;
use pvio_daemon::{dm, script};
use std::ffi::OsStr;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let name = args.next().map(PathBuf::from).unwrap_or_default();
    let result = match name.file_name().and_then(OsStr::to_str) {
        Some(dm::NAME) => dm::run(args),
        Some(script::NAME) => script::run(args),
        Some(script::NIC_NAME) => script::run_nic(args),
        _ => match Cli::try_parse() {
            Ok(cli) => handover::continued().and_then(|()| cli::execute(cli.command)),
            Err(e) if e.use_stderr() => Err(cli::misuse(&e)),
            // Prints help or version.
            Err(e) => e.exit(),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Standard error may be closed.
            let _ = writeln!(std::io::stderr(), "{failure}");
            ExitCode::from(failure.code)
        }
    }
}
