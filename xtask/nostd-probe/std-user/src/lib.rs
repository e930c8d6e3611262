//! Needs std.
#![forbid(unsafe_code)]

/// Uses std.
pub fn now() -> std::time::Instant {
    std::time::Instant::now()
}
