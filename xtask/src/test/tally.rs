//! Counts from the output of `cargo test -- --show-output`.
//!
//! A test that cannot run on a machine prints a line that starts with `SKIPPED:` and returns. The
//! test harness counts it as passed; this module counts it as skipped.

use crate::report::Counts;

/// Counts from the output.
#[derive(Default)]
pub struct Tally {
    /// Number of tests that passed, failed, and were ignored or skipped.
    pub counts: Counts,
    /// The `SKIPPED:` lines, with the test's name if it is known.
    pub skipped: Vec<String>,
}

/// Evaluates the complete output of one `cargo test`.
pub fn read(output: &str) -> Tally {
    let mut tally = Tally::default();
    // The test that printed the lines, and whether it is already counted as skipped.
    let mut test: Option<(&str, bool)> = None;
    for line in output.lines() {
        if let Some(name) = section(line) {
            test = Some((name, false));
        } else if is_heading(line) {
            test = None;
        } else if line.starts_with("SKIPPED:") {
            match &mut test {
                Some((name, counted)) => {
                    tally.skipped.push(format!("{line} [{name}]"));
                    tally.counts.skipped += usize::from(!*counted);
                    *counted = true;
                }
                None => {
                    tally.skipped.push(line.to_owned());
                    tally.counts.skipped += 1;
                }
            }
        }
    }
    let harness = results(output);
    // The harness counts skipped tests as passed.
    tally.counts.passed = harness.passed.saturating_sub(tally.counts.skipped);
    tally.counts.failed = harness.failed;
    tally.counts.skipped += harness.skipped;
    tally
}

/// Returns the sum of the harnesses' results. Only the last result of a test program counts, since
/// tests that run themselves again, for example in a namespace, print earlier results.
/// Documentation has several results that are added.
fn results(output: &str) -> Counts {
    let (mut sum, mut last, mut documentation) = (Counts::default(), Counts::default(), false);
    for line in output.lines() {
        let begins = line.trim_start();
        if begins.starts_with("Running ") || begins.starts_with("Doc-tests ") {
            sum = sum + last;
            last = Counts::default();
            documentation = begins.starts_with("Doc-tests ");
        } else if let Some(counts) = result(line) {
            last = if documentation { last + counts } else { counts };
        }
    }
    sum + last
}

/// Returns the output without successful tests and what they printed.
pub fn without_successes(output: &str) -> String {
    let mut kept = String::new();
    let mut inside = false;
    for line in output.lines() {
        if is_heading(line) {
            inside = line == "successes:";
        }
        let passing = line.starts_with("test ") && line.ends_with(" ... ok");
        if !inside && !passing {
            kept += line;
            kept.push('\n');
        }
    }
    kept
}

/// Parses a heading such as `---- ring::tests::wraps stdout ----`.
fn section(line: &str) -> Option<&str> {
    line.strip_prefix("---- ")?.strip_suffix(" stdout ----")
}

/// Returns whether the lines after this one belong to no test.
fn is_heading(line: &str) -> bool {
    matches!(line, "successes:" | "failures:") || line.starts_with("test result: ")
}

/// Parses `test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; …`.
fn result(line: &str) -> Option<Counts> {
    let (_, numbers) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let number = |what| {
        let mut parts = numbers.split(';').map(str::trim);
        parts.find_map(|part| part.strip_suffix(what)?.trim().parse().ok()).unwrap_or(0)
    };
    Some(Counts { passed: number("passed"), failed: number("failed"), skipped: number("ignored") })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
     Running unittests src/lib.rs (target/debug/deps/pvio_ring-1)

running 3 tests
test a ... ok
test b ... ok
test c ... FAILED

successes:

---- a stdout ----
hello
---- b stdout ----
SKIPPED: no libxen-dev; apt-get install libxen-dev
SKIPPED: and no gcc either


successes:
    a
    b

failures:

---- c stdout ----
thread 'c' panicked

failures:
    c

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s

   Doc-tests pvio_ring

running 1 test
test ring/src/lib.rs - (line 3) ... ok

test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s
";

    #[test]
    fn skipped_test_is_not_counted_as_passed() {
        let tally = read(OUTPUT);
        assert_eq!(tally.counts, Counts { passed: 2, failed: 1, skipped: 2 });
        assert_eq!(
            tally.skipped,
            [
                "SKIPPED: no libxen-dev; apt-get install libxen-dev [b]",
                "SKIPPED: and no gcc either [b]"
            ]
        );
    }

    #[test]
    fn output_filter_removes_only_passing_tests() {
        let kept = without_successes(OUTPUT);
        assert!(kept.contains("test c ... FAILED") && kept.contains("thread 'c' panicked"));
        assert!(kept.contains("Doc-tests") && !kept.contains("test a ... ok"));
        assert!(!kept.contains("hello") && !kept.contains("SKIPPED"));
    }

    #[test]
    fn nested_test_run_is_counted_once() {
        let nested = "     Running tests/taps.rs (target/debug/deps/taps-1)

running 1 test
test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 2 filtered out; finished in 0.00s
test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
   Doc-tests pvio
test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";
        assert_eq!(read(nested).counts, Counts { passed: 6, failed: 0, skipped: 0 });
    }

    #[test]
    fn output_without_results_counts_no_tests() {
        assert_eq!(read("error: could not compile `pvio-ring`\n").counts, Counts::default());
    }
}
