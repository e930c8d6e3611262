//! Signals that end the process in an orderly way: SIGTERM, SIGINT and SIGHUP.
//!
//! SIGINT and SIGHUP stay ignored if they were ignored at start, as after `nohup` or `&` in a script.

use crate::failure::Failure;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::ffi::c_int;

/// Calls `handler` on a new thread whenever one of the signals arrives.
///
/// # Errors
/// The handler cannot be installed.
pub fn listen(mut handler: impl FnMut() + Send + 'static) -> Result<(), Failure> {
    let failed = |e: std::io::Error| {
        Failure::new(format!("the signal handler cannot be installed: {e}"), "")
    };
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = ignored(&status);
    let optional = [SIGINT, SIGHUP].into_iter().filter(|signal| ignored & bit(*signal) == 0);
    let mut signals = Signals::new([SIGTERM].into_iter().chain(optional)).map_err(failed)?;
    let wait = move || signals.forever().for_each(|_| handler());
    std::thread::Builder::new().name("signals".into()).spawn(wait).map_err(failed)?;
    Ok(())
}

/// Returns the mask of ignored signals, from the text of `/proc/PID/status`.
fn ignored(status: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default()
}

const fn bit(signal: c_int) -> u64 {
    1 << (signal - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_parsed_from_proc_status() {
        let status = "Name:\tpvio\nSigBlk:\t00000000ffffffff\nSigIgn:\t0000000000001001\n";
        assert_eq!(ignored(status) & bit(SIGHUP), bit(SIGHUP));
        assert_eq!(ignored(status) & bit(SIGINT), 0);
        assert_eq!(ignored(""), 0);
    }
}
