//! The `pvio` command.
#![forbid(unsafe_code)]

use clap::Parser;
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let result = match pvio::cli::Cli::try_parse() {
        Ok(cli) => pvio::cli::execute(cli.command),
        Err(e) if e.use_stderr() => Err(pvio::cli::misuse(&e)),
        // Help and version.
        Err(e) => e.exit(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Nobody may be left to read it.
            let _ = writeln!(std::io::stderr(), "{failure}");
            ExitCode::from(failure.code)
        }
    }
}
