//! Rate limit of log lines that a peer can cause: a guest, an image, a server, a packet.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines that may be written consecutively after an idle period.
const BURST: u32 = 10;
/// Time after which one more line may be written.
const EVERY: Duration = Duration::from_secs(10);

/// Rate limit of the log lines for one kind of event of one device. It also counts the events.
#[derive(Debug, Default)]
pub struct LogLimit {
    seen: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Number of used lines of [`BURST`]. The next field is the time since which it is valid.
    spent: u32,
    since: Option<Instant>,
    /// Number of events since the last logged one.
    silent: u64,
}

impl LogLimit {
    /// Returns a limit without events.
    #[must_use]
    pub const fn new() -> Self {
        let state = State { spent: 0, since: None, silent: 0 };
        Self { seen: AtomicU64::new(0), state: Mutex::new(state) }
    }

    /// Counts an event. If it may be logged, returns the number of events before it that were not.
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

    /// Returns the number of events, logged or not.
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
