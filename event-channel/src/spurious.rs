//! Delays the events of a peer that sends them without work.
//!
//! A receiver takes an event, finds nothing to do, and waits again. A peer that continues to send
//! costs one wake-up per event. Linux delays the "late EOI" of such an event (XSA-332), so that the
//! next one arrives later. A receiver in user space delays [`take`](crate::EventChannel::take): the
//! port stays masked (on Xen), or its descriptor is not waited for.

use core::time::Duration;

/// Number of consecutive spurious events that are not delayed. Binding raises one, and so does a
/// request that was found before its event arrived.
const THRESHOLD: u32 = 4;
/// The first delay; each later one is twice as long.
const SHORTEST: Duration = Duration::from_millis(1);
/// The longest delay, at which a peer causes eight wake-ups per second.
const LONGEST: Duration = Duration::from_millis(128);

/// Decides when the next event of a peer may be taken.
///
/// A receiver calls [`taken`](Self::taken) and [`worked`](Self::worked) when that happens, and
/// [`before_wait`](Self::before_wait) before it waits. It takes events only if
/// [`may_take`](Self::may_take).
///
/// ```
/// use core::time::Duration;
/// use pvio_event_channel::SpuriousEvents;
///
/// let (mut events, now) = (SpuriousEvents::default(), Duration::ZERO);
/// for _ in 0..4 {
///     events.taken();
///     assert_eq!(events.before_wait(now, || ()), None);
/// }
/// events.taken();
/// let delay = events.before_wait(now, || ()).unwrap();
/// assert!(!events.may_take(|| now) && events.may_take(|| now + delay));
/// ```
#[derive(Clone, Copy, Default, Debug)]
pub struct SpuriousEvents {
    /// Consecutive events without work.
    count: u32,
    /// An event was taken since the last wait, and no work was found yet.
    taken: bool,
    /// When events may be taken again.
    until: Option<Duration>,
}

impl SpuriousEvents {
    /// Records that an event was taken.
    pub const fn taken(&mut self) {
        self.taken = true;
    }

    /// Records that there was work, whether or not an event announced it.
    pub const fn worked(&mut self) {
        *self = Self { count: 0, taken: false, until: None };
    }

    /// Whether events may be taken. Reads the clock `now` (monotonic, with any origin) only while
    /// they are delayed.
    #[must_use]
    pub fn may_take(&self, now: impl FnOnce() -> Duration) -> bool {
        self.until.is_none_or(|until| until <= now())
    }

    /// Records that there was no work, and returns how long events stay delayed: the maximum time to
    /// wait. Calls `begins` if a delay begins.
    pub fn before_wait(&mut self, now: Duration, begins: impl FnOnce()) -> Option<Duration> {
        if core::mem::take(&mut self.taken) {
            self.count = self.count.saturating_add(1);
            if let Some(doublings) = self.count.checked_sub(THRESHOLD + 1) {
                let delay = SHORTEST.saturating_mul(1 << doublings.min(7)).min(LONGEST);
                self.until = now.checked_add(delay);
                begins();
            }
        }
        if self.may_take(|| now) {
            self.until = None;
        }
        self.until.map(|until| until.saturating_sub(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storm_without_work_is_delayed_up_to_the_limit() {
        let (mut events, mut now) = (SpuriousEvents::default(), Duration::ZERO);
        let mut taken = 0;
        // A peer that sends all the time, for ten seconds.
        while now < Duration::from_secs(10) {
            if events.may_take(|| now) {
                events.taken();
                taken += 1;
            }
            now += events.before_wait(now, || ()).unwrap_or(Duration::from_micros(1));
        }
        assert!((80..100).contains(&taken), "{taken}");
    }

    #[test]
    fn work_ends_the_delay() {
        let (mut events, now) = (SpuriousEvents::default(), Duration::from_secs(1));
        for _ in 0..20 {
            events.taken();
            let _ = events.before_wait(now, || ());
        }
        assert!(!events.may_take(|| now));
        events.worked();
        assert!(events.may_take(|| now));
        events.taken();
        assert_eq!(events.before_wait(now, || ()), None);
    }

    #[test]
    fn events_with_work_are_never_delayed() {
        let (mut events, now) = (SpuriousEvents::default(), Duration::ZERO);
        for _ in 0..100 {
            events.taken();
            events.worked();
            assert_eq!(events.before_wait(now, || ()), None);
            // One that arrives after its request was found.
            events.taken();
            assert_eq!(events.before_wait(now, || ()), None);
        }
    }
}
