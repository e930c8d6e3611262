//! Counters that any thread may read while the queue runs.

use crate::fault::{DropReason, Fault};
use core::sync::atomic::{AtomicU64, Ordering};
use pvio_ring::proto::netif::CtrlStatus;

/// Counters of one queue since its creation. Only its worker writes them; any thread may read them.
/// Values read together are not a consistent snapshot.
#[derive(Debug, Default)]
pub struct Stats {
    tx_packets: AtomicU64,
    tx_bytes: AtomicU64,
    rx_packets: AtomicU64,
    rx_bytes: AtomicU64,
    wakeups: AtomicU64,
    delayed_events: AtomicU64,
    notifications: AtomicU64,
    tx_gso_packets: AtomicU64,
    rx_gso_packets: AtomicU64,
    gso_fixups: AtomicU64,
    limited: AtomicU64,
    steered: AtomicU64,
    staged: AtomicU64,
    controls: [AtomicU64; 4],
    ended: [AtomicU64; Fault::CODES.len()],
    dropped: [AtomicU64; DropReason::ALL.len()],
    /// Usage of the queue's budgets; 0 while there is no queue.
    held: Held<AtomicU64>,
    limits: Held<AtomicU64>,
}

/// Usage of a queue's budgets, or their limits.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Held<T> {
    /// Packets that wait for the guest to post buffers; `bytes` is their size.
    pub packets: T,
    pub bytes: T,
    /// Cached mappings of staged pages.
    pub staged: T,
}

impl Held<AtomicU64> {
    fn set(&self, held: Held<usize>) {
        self.packets.store(held.packets as u64, Ordering::Relaxed);
        self.bytes.store(held.bytes as u64, Ordering::Relaxed);
        self.staged.store(held.staged as u64, Ordering::Relaxed);
    }
}

impl Stats {
    /// Returns the number of packets from the guest that the port accepted.
    #[must_use]
    pub fn tx_packets(&self) -> u64 {
        self.tx_packets.load(Ordering::Relaxed)
    }

    /// Returns the number of bytes of those packets.
    #[must_use]
    pub fn tx_bytes(&self) -> u64 {
        self.tx_bytes.load(Ordering::Relaxed)
    }

    /// Returns the number of packets delivered to the guest's buffers.
    #[must_use]
    pub fn rx_packets(&self) -> u64 {
        self.rx_packets.load(Ordering::Relaxed)
    }

    /// Returns the number of bytes of those packets.
    #[must_use]
    pub fn rx_bytes(&self) -> u64 {
        self.rx_bytes.load(Ordering::Relaxed)
    }

    /// Returns how often the worker slept and was woken.
    #[must_use]
    pub fn wakeups(&self) -> u64 {
        self.wakeups.load(Ordering::Relaxed)
    }

    /// Returns how often the guest's events were delayed, because they announced no work.
    #[must_use]
    pub fn delayed_events(&self) -> u64 {
        self.delayed_events.load(Ordering::Relaxed)
    }

    /// Returns the number of events sent to the guest.
    #[must_use]
    pub fn notifications(&self) -> u64 {
        self.notifications.load(Ordering::Relaxed)
    }

    /// Returns the number of packets from the guest that were unsegmented.
    #[must_use]
    pub fn tx_gso_packets(&self) -> u64 {
        self.tx_gso_packets.load(Ordering::Relaxed)
    }

    /// Returns the number of packets delivered to the guest that were unsegmented.
    #[must_use]
    pub fn rx_gso_packets(&self) -> u64 {
        self.rx_gso_packets.load(Ordering::Relaxed)
    }

    /// Returns the number of unsegmented packets whose checksum the guest had not left blank as
    /// required.
    #[must_use]
    pub fn gso_fixups(&self) -> u64 {
        self.gso_fixups.load(Ordering::Relaxed)
    }

    /// Returns how often packets from the guest had to wait because of the rate limit.
    #[must_use]
    pub fn limited(&self) -> u64 {
        self.limited.load(Ordering::Relaxed)
    }

    /// Returns the number of packets received here and steered to another queue by the guest's
    /// mapping.
    #[must_use]
    pub fn steered(&self) -> u64 {
        self.steered.load(Ordering::Relaxed)
    }

    /// Returns the number of slots whose data was copied through the mapping of a staged page.
    #[must_use]
    pub fn staged(&self) -> u64 {
        self.staged.load(Ordering::Relaxed)
    }

    /// Returns the number of control ring requests with this response status. The first queue
    /// counts those of the vif.
    #[must_use]
    pub fn controls(&self, status: CtrlStatus) -> u64 {
        self.controls.get(status as usize).map_or(0, |n| n.load(Ordering::Relaxed))
    }

    /// Returns how often the vif was ended, over all its sessions, because of this fault.
    #[must_use]
    pub fn ended(&self, fault: Fault) -> u64 {
        self.ended.get(fault.number()).map_or(0, |n| n.load(Ordering::Relaxed))
    }

    /// Returns the number of packets dropped for this reason.
    #[must_use]
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.dropped.get(reason as usize).map_or(0, |n| n.load(Ordering::Relaxed))
    }

    /// Returns the number of dropped packets.
    #[must_use]
    pub fn dropped_in_all(&self) -> u64 {
        self.dropped.iter().map(|n| n.load(Ordering::Relaxed)).fold(0, u64::wrapping_add)
    }

    /// Returns every counter that is not divided by reason, with its name.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.table().into_iter().map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
    }

    fn table(&self) -> [(&'static str, &AtomicU64); 13] {
        // The exhaustive pattern makes a new counter a compile error here.
        let Self {
            tx_packets,
            tx_bytes,
            rx_packets,
            rx_bytes,
            wakeups,
            delayed_events,
            notifications,
            tx_gso_packets,
            rx_gso_packets,
            gso_fixups,
            limited,
            steered,
            staged,
            controls: _,
            ended: _,
            dropped: _,
            held: _,
            limits: _,
        } = self;
        [
            ("tx-packets", tx_packets),
            ("tx-bytes", tx_bytes),
            ("rx-packets", rx_packets),
            ("rx-bytes", rx_bytes),
            ("tx-gso-packets", tx_gso_packets),
            ("rx-gso-packets", rx_gso_packets),
            ("gso-fixups", gso_fixups),
            ("limited", limited),
            ("steered", steered),
            ("staged-slots", staged),
            ("notifies", notifications),
            ("wakeups", wakeups),
            ("delayed-events", delayed_events),
        ]
    }

    /// Returns all counters, levels and limits, always in the same order, for a process that
    /// publishes them to another one. A later version only appends to them.
    pub fn words(&self) -> impl Iterator<Item = u64> {
        self.all().map(|counter| counter.load(Ordering::Relaxed))
    }

    /// Sets all counters, levels and limits to what [`words`](Self::words) returned elsewhere; those
    /// that are missing stay.
    pub fn set_words(&self, words: impl IntoIterator<Item = u64>) {
        for (counter, word) in self.all().zip(words) {
            counter.store(word, Ordering::Relaxed);
        }
    }

    fn all(&self) -> impl Iterator<Item = &AtomicU64> {
        let levels = [&self.held, &self.limits].into_iter().flat_map(|held| {
            let Held { packets, bytes, staged } = held;
            [packets, bytes, staged]
        });
        let divided = self.controls.iter().chain(&self.ended).chain(&self.dropped);
        self.table().into_iter().map(|(_, counter)| counter).chain(levels).chain(divided)
    }

    /// Returns [`ended`](Self::ended) for every fault, by its code.
    pub fn ends(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Fault::CODES.iter().copied().zip(self.ended.iter().map(|n| n.load(Ordering::Relaxed)))
    }

    /// Returns [`dropped`](Self::dropped) for every reason, by its code.
    pub fn drops(&self) -> impl Iterator<Item = (&'static str, u64)> {
        DropReason::ALL.iter().map(|reason| (reason.code(), self.dropped(*reason)))
    }

    /// Returns usage and limit of each budget, by name.
    pub fn budgets(&self) -> impl Iterator<Item = (&'static str, u64, u64)> {
        let (held, limits) = (&self.held, &self.limits);
        [
            ("waiting-packets", &held.packets, &limits.packets),
            ("waiting-bytes", &held.bytes, &limits.bytes),
            ("staged-pages", &held.staged, &limits.staged),
        ]
        .into_iter()
        .map(|(name, used, limit)| {
            (name, used.load(Ordering::Relaxed), limit.load(Ordering::Relaxed))
        })
    }

    /// Sets the current usage.
    pub(crate) fn hold(&self, held: Held<usize>) {
        self.held.set(held);
    }

    /// Sets the limits.
    pub(crate) fn limit(&self, limits: Held<usize>) {
        self.limits.set(limits);
    }

    pub(crate) fn count_tx(&self, bytes: usize, gso: bool) {
        add(&self.tx_packets, 1);
        add(&self.tx_gso_packets, u64::from(gso));
        add(&self.tx_bytes, bytes as u64);
    }

    pub(crate) fn count_steered(&self) {
        add(&self.steered, 1);
    }

    pub(crate) fn count_staged(&self, slots: usize) {
        add(&self.staged, slots as u64);
    }

    pub(crate) fn count_control(&self, status: CtrlStatus) {
        self.controls.get(status as usize).into_iter().for_each(|n| add(n, 1));
    }

    pub(crate) fn count_end(&self, fault: Fault) {
        self.ended.get(fault.number()).into_iter().for_each(|n| add(n, 1));
    }

    pub(crate) fn count_limited(&self) {
        add(&self.limited, 1);
    }

    pub(crate) fn count_gso_fixup(&self) {
        add(&self.gso_fixups, 1);
    }

    pub(crate) fn count_rx(&self, bytes: usize, gso: bool) {
        add(&self.rx_packets, 1);
        add(&self.rx_gso_packets, u64::from(gso));
        add(&self.rx_bytes, bytes as u64);
    }

    pub(crate) fn count_notification(&self) {
        add(&self.notifications, 1);
    }

    /// Counts a wake-up of the queue by an event.
    pub fn count_wakeup(&self) {
        add(&self.wakeups, 1);
    }

    /// Counts that the guest's events were delayed, because they announced no work.
    pub fn count_delay_of_events(&self) {
        add(&self.delayed_events, 1);
    }

    /// Counts a dropped packet. Only the thread that serves the queue may call it.
    pub fn drop_one(&self, reason: DropReason) {
        if let Some(count) = self.dropped.get(reason as usize) {
            add(count, 1);
        }
    }

    /// Counts [`DropReason::RxSwitch`]. Only the threads that send to the vif count this reason,
    /// concurrently.
    pub fn drop_at_a_switch(&self) {
        if let Some(count) = self.dropped.get(DropReason::RxSwitch as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Adds to a counter that has one writer: a load and a store are sufficient and much cheaper than
/// an atomic addition.
#[inline]
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_restore_every_counter_and_level() {
        let stats = Stats::default();
        stats.set_words(1..);
        assert!(stats.words().eq(1..=stats.words().count() as u64));
        let other = Stats::default();
        other.set_words(stats.words());
        assert!(other.named().eq(stats.named()) && other.budgets().eq(stats.budgets()));
        assert!(other.drops().eq(stats.drops()) && other.ends().eq(stats.ends()));
        let status = CtrlStatus::BufferOverflow;
        assert!(other.controls(status) == stats.controls(status) && stats.controls(status) > 0);
    }
}
