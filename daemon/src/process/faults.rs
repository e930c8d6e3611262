//! Faults that another process reports.

use pvio_xenbus::driver::Fault;
use std::borrow::Cow;

/// Maximum length of a code.
const MAX_CODE: usize = 48;
/// Maximum length of a text in characters.
const MAX_TEXT: usize = 1024;
/// The code of a fault whose own code is not acceptable.
const OTHER: &str = "device-process";

/// Returns a fault as another process has reported it. That process may have been taken over: the
/// texts, which go to the log and to xenstore, are bounded and have no control characters.
#[must_use]
pub fn reported(fault: Fault) -> Fault {
    let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let is_code = |code: &str| (1..=MAX_CODE).contains(&code.len()) && code.chars().all(is_word);
    Fault {
        code: if is_code(&fault.code) { fault.code } else { OTHER.into() },
        text: plain(&fault.text),
        remedy: fault.remedy.map(|remedy| Cow::Owned(plain(&remedy))),
        errno: fault.errno,
    }
}

fn plain(text: &str) -> String {
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(printable).take(MAX_TEXT).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reported_fault_is_unchanged() {
        let fault = Fault::new("ring-overflow", "the ring is full").with_remedy("report it");
        assert_eq!(reported(fault.clone()), fault);
    }

    #[test]
    fn fault_of_process_that_was_taken_over_is_bounded() {
        let fault = Fault::new("x; rm -rf", "\u{1b}[2J\n".repeat(10_000)).with_remedy("\0");
        let fault = reported(fault);
        assert_eq!((&*fault.code, fault.text.chars().count()), (OTHER, MAX_TEXT));
        assert!(!fault.text.contains(|c: char| c.is_control()));
        assert_eq!(fault.remedy.as_deref(), Some(" "));
        assert_eq!(reported(Fault::new("x".repeat(MAX_CODE + 1), "")).code, OTHER);
    }
}
