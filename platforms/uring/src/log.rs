//! Log lines that a peer can cause: a guest, an image, a server, a packet.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines at once, after a time of rest.
const BURST: u32 = 10;
/// How long it takes until there is one more.
const EVERY: Duration = Duration::from_secs(10);

/// Limits how often one kind of event of one device is logged, and counts all of them.
#[derive(Debug, Default)]
pub struct LogLimit {
    seen: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Lines that may not be written now, of [`BURST`], and since when that is so.
    spent: u32,
    since: Option<Instant>,
    /// Events since the last that was logged.
    silent: u64,
}

impl LogLimit {
    /// None seen yet.
    #[must_use]
    pub const fn new() -> Self {
        let state = State { spent: 0, since: None, silent: 0 };
        Self { seen: AtomicU64::new(0), state: Mutex::new(state) }
    }

    /// Counts an event. If it is to be logged, how many before it were not.
    pub fn admit(&self) -> Option<u64> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&self, now: Instant) -> Option<u64> {
        self.seen.fetch_add(1, Ordering::Relaxed);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let since = *state.since.get_or_insert(now);
        let back = now.saturating_duration_since(since).as_nanos() / EVERY.as_nanos();
        let back = u32::try_from(back).unwrap_or(BURST).min(BURST);
        if back > 0 {
            state.spent = state.spent.saturating_sub(back);
            state.since = Some(if state.spent == 0 { now } else { since + EVERY * back });
        }
        if state.spent == 0 {
            state.since = Some(now);
        }
        if state.spent >= BURST {
            state.silent += 1;
            return None;
        }
        state.spent += 1;
        Some(std::mem::take(&mut state.silent))
    }

    /// How many events there were, logged or not.
    #[must_use]
    pub fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_logged_now_and_then_and_counted_whole() {
        let (limit, mut now) = (LogLimit::new(), Instant::now());
        let flood = |now| (0..1000).filter_map(|_| limit.admit_at(now)).collect::<Vec<_>>();
        assert_eq!(flood(now), [0; BURST as usize]);
        now += EVERY;
        assert_eq!(flood(now), [1000 - u64::from(BURST)], "and says how many were not");
        now += EVERY / 2;
        assert_eq!(flood(now), []);
        now += EVERY / 2;
        assert_eq!(flood(now), [999 + 1000]);
        now += EVERY * 3600;
        assert_eq!(flood(now).len(), BURST as usize, "rest is not saved up");
        assert_eq!(limit.seen(), 5000);
    }
}
