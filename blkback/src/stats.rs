use crate::engine::Pauses;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};
use pvio_ring::proto::blkif::RefusalReason;

/// Counters and levels of a queue, readable while it runs.
#[derive(Debug, Default)]
pub struct Stats {
    /// Completed reads.
    pub reads: Counter,
    /// Completed writes, including barriers.
    pub writes: Counter,
    /// Completed flushes.
    pub flushes: Counter,
    /// Flushes that failed or were not attempted because an earlier one failed. If not 0, the disk
    /// must be attached again.
    pub failed_flushes: Counter,
    /// Completed discards.
    pub discards: Counter,
    /// Bytes read by the guest.
    pub read_bytes: Counter,
    /// Bytes written by the guest.
    pub written_bytes: Counter,
    /// Guest pages mapped for requests.
    pub mapped_pages: Counter,
    /// Pages of requests that had a cached mapping.
    pub reused_pages: Counter,
    /// Pages whose data was copied because the host could not map them for want of resources.
    pub unmappable_pages: Counter,
    /// Pages copied to or from the guest.
    pub copied_pages: Counter,
    /// Cached mappings, as of the last clock tick.
    pub cached_mappings: Counter,
    /// Bounce buffers registered with io_uring.
    pub registered_pages: Counter,
    /// Notifications sent.
    pub notifies: Counter,
    /// Number of times the worker was woken.
    pub wakeups: Counter,
    /// Number of times the guest's events were delayed, because they announced no work.
    pub delayed_events: Counter,
    refused: [Counter; REASONS.len()],
    /// Requests in flight, and pages in use by them.
    in_flight: Counter,
    request_pages: Counter,
    /// 0 while the queue does not exist.
    limits: Limits,
    /// Number of pauses because the storage was full.
    pauses: Counter,
    /// Total time of pauses in milliseconds.
    paused_time: Counter,
    /// 1 during a pause.
    paused: Counter,
}

/// Limits of a queue.
#[derive(Debug, Default)]
struct Limits {
    in_flight: Counter,
    request_pages: Counter,
    cached_mappings: Counter,
    registered_pages: Counter,
}

/// All reasons for which a request is rejected, in the order of the counters.
const REASONS: [RefusalReason; 9] = [
    RefusalReason::UnknownOperation,
    RefusalReason::SegmentCount,
    RefusalReason::SegmentBounds,
    RefusalReason::OutOfRange,
    RefusalReason::Misaligned,
    RefusalReason::ReadOnly,
    RefusalReason::Grant,
    RefusalReason::Engine,
    RefusalReason::Empty,
];

impl Stats {
    pub(crate) fn refuse(&self, reason: RefusalReason) {
        if let Some(i) = REASONS.iter().position(|&r| r == reason) {
            self.refused[i].add(1);
        }
    }

    /// Sets the limits of requests in flight, pages in use by them, cached mappings, and registered pages.
    pub(crate) fn limit(&self, [in_flight, request_pages, cached, registered]: [usize; 4]) {
        let limits = &self.limits;
        limits.in_flight.set(in_flight as u64);
        limits.request_pages.set(request_pages as u64);
        limits.cached_mappings.set(cached as u64);
        limits.registered_pages.set(registered as u64);
    }

    /// Sets the levels of requests in flight and pages in use by them.
    pub(crate) fn occupy(&self, in_flight: usize, request_pages: usize) {
        self.in_flight.set(in_flight as u64);
        self.request_pages.set(request_pages as u64);
    }

    /// Adds the pauses of an engine since `before`.
    pub(crate) fn add_pauses(&self, before: Pauses, now: Pauses) {
        self.pauses.add(now.count.saturating_sub(before.count));
        let millis = |pauses: Pauses| u64::try_from(pauses.time.as_millis()).unwrap_or(u64::MAX);
        self.paused_time.add(millis(now).saturating_sub(millis(before)));
        self.paused.set(now.is_paused.into());
    }

    /// Sets all levels and limits to 0: the queue is dropped.
    pub(crate) fn vacate(&self) {
        self.limit([0; 4]);
        self.occupy(0, 0);
        self.cached_mappings.set(0);
        self.registered_pages.set(0);
        self.paused.set(0);
    }

    /// Returns usage and limit of each budget, by name.
    pub fn budgets(&self) -> impl Iterator<Item = (&'static str, u64, u64)> {
        let Limits { in_flight, request_pages, cached_mappings, registered_pages } = &self.limits;
        [
            ("requests", &self.in_flight, in_flight),
            ("request-pages", &self.request_pages, request_pages),
            ("kept-pages", &self.cached_mappings, cached_mappings),
            ("registered-pages", &self.registered_pages, registered_pages),
        ]
        .into_iter()
        .map(|(name, used, limit)| (name, used.get(), limit.get()))
    }

    /// Returns the sum of several queues' counters.
    #[must_use]
    pub fn total(all: &[Arc<Self>]) -> Self {
        let total = Self::default();
        for one in all {
            for (sum, counter) in total.counters().zip(one.counters()) {
                sum.add(counter.get());
            }
        }
        total
    }

    /// Returns every counter except those of [`refused`](Self::refused), with its name.
    /// `kept-pages`, `registered-pages` and `paused` are levels; the others only grow.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let all = self.table().into_iter().chain(self.later_table());
        all.map(|(name, counter)| (name, counter.get()))
    }

    /// Returns all counters, levels and limits, always in the same order, for a process that
    /// publishes them to another one. A later version only appends to them.
    pub fn words(&self) -> impl Iterator<Item = u64> {
        self.counters().map(Counter::get)
    }

    /// Sets all counters, levels and limits to what [`words`](Self::words) returned elsewhere; those
    /// that are missing stay.
    pub fn set_words(&self, words: impl IntoIterator<Item = u64>) {
        for (counter, word) in self.counters().zip(words) {
            counter.set(word);
        }
    }

    fn counters(&self) -> impl Iterator<Item = &Counter> {
        let Limits { in_flight, request_pages, cached_mappings, registered_pages } = &self.limits;
        let limits = [in_flight, request_pages, cached_mappings, registered_pages];
        let used = [&self.in_flight, &self.request_pages];
        let all = self.table().into_iter().map(|(_, counter)| counter).chain(&self.refused);
        let later = self.later_table().into_iter().map(|(_, counter)| counter);
        all.chain(used).chain(limits).chain(later)
    }

    /// Returns the counters that were added after the order of [`words`](Self::words) was fixed.
    fn later_table(&self) -> [(&'static str, &Counter); 3] {
        let Self { pauses, paused_time, paused, .. } = self;
        [("pauses", pauses), ("paused-ms", paused_time), ("paused", paused)]
    }

    fn table(&self) -> [(&'static str, &Counter); 16] {
        // The exhaustive pattern makes the compiler report a counter that is missing here.
        let Self {
            reads,
            writes,
            flushes,
            failed_flushes,
            discards,
            read_bytes,
            written_bytes,
            mapped_pages,
            reused_pages,
            unmappable_pages,
            copied_pages,
            cached_mappings,
            registered_pages,
            notifies,
            wakeups,
            delayed_events,
            refused: _,
            in_flight: _,
            request_pages: _,
            limits: _,
            pauses: _,
            paused_time: _,
            paused: _,
        } = self;
        [
            ("reads", reads),
            ("writes", writes),
            ("flushes", flushes),
            ("failed-flushes", failed_flushes),
            ("discards", discards),
            ("read-bytes", read_bytes),
            ("written-bytes", written_bytes),
            ("mapped-pages", mapped_pages),
            ("reused-pages", reused_pages),
            ("unmappable-pages", unmappable_pages),
            ("copied-pages", copied_pages),
            ("kept-pages", cached_mappings),
            ("registered-pages", registered_pages),
            ("notifies", notifies),
            ("wakeups", wakeups),
            ("delayed-events", delayed_events),
        ]
    }

    /// Returns the number of rejected or failed requests by reason.
    pub fn refused(&self) -> impl Iterator<Item = (RefusalReason, u64)> {
        REASONS.into_iter().zip(self.refused.iter().map(Counter::get))
    }
}

/// A counter with one writing thread and any number of readers.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Called only by the thread that serves the queue.
    #[inline]
    pub fn add(&self, n: u64) {
        // One writer: no read-modify-write is needed.
        self.0.store(self.get().wrapping_add(n), Ordering::Relaxed);
    }

    /// Sets the value, for a level.
    pub(crate) fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// Returns the current value.
    #[must_use]
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn words_restore_every_counter_and_level() {
        let stats = Stats::default();
        stats.set_words(1..);
        assert!(stats.words().eq(1..=stats.words().count() as u64));
        let other = Stats::default();
        other.set_words(stats.words());
        assert!(other.named().eq(stats.named()) && other.budgets().eq(stats.budgets()));
        assert!(other.refused().eq(stats.refused()));
        // An earlier version published fewer.
        let before: Vec<u64> = other.words().collect();
        other.set_words([7]);
        assert_eq!(other.words().next(), Some(7));
        assert!(other.words().skip(1).eq(before.into_iter().skip(1)));
    }
}
