//! Messages about slow operations.

use std::fmt::Display;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_millis(500);

/// Prints the time since `start`, if it is half a second or more.
pub fn since(start: Instant, what: impl Display) {
    let took = start.elapsed();
    if took >= LONG {
        println!("PVIO-LAB {:.1} s: {what}", took.as_secs_f64());
    }
}
