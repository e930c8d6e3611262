//! The notification protocol of a shared ring.
//!
//! Each direction of a ring has a *producer index* and an *event index* in shared memory. The
//! protocol has three phases:
//!
//! 1. **Produce.** Write slots, then publish the producer index (`Release`). Execute a full fence,
//!    then read the peer's event index: notify only if it is within the range just published.
//! 2. **Consume.** Read the producer index (`Acquire`), then the slots up to it. No fence and no
//!    notification are needed: while the consumer runs, the event index stays behind.
//! 3. **Sleep.** Set the event index to one past the consumed index, execute a full fence, and *read
//!    the producer index again* (the final check). The consumer may wait only if it has not
//!    changed.
//!
//! The pair of fences prevents the race between the producer's "store prod, fence, load event" and
//! the consumer's "store event, fence, load prod". With both fences at least one side sees the
//! other's store: either the producer notifies, or the consumer does not sleep. Without one of the
//! fences or the final check, a wake-up can be lost; `tests/loom_notify.rs` shows that the model
//! checker finds this.
//!
//! Everything here is generic over [`IndexMemory`], so that the code that runs is the code that is
//! model-checked. (`ring.h`: `RING_PUSH_*_AND_CHECK_NOTIFY`, `RING_FINAL_CHECK_FOR_*`.)

/// One direction of a ring's shared indices: a producer index and the consumer's event index.
pub trait IndexMemory {
    /// Reads the producer index; the slots before it are readable afterwards (`Acquire`).
    fn load_prod(&self) -> u32;
    /// Publishes the producer index; the slots before it must have been written (`Release`).
    fn store_prod(&self, value: u32);
    /// Reads the event index.
    fn load_event(&self) -> u32;
    /// Writes the event index.
    fn store_event(&self, value: u32);
    /// A full (store-to-load) fence.
    fn fence(&self);
}

/// Publishes slots `old..new` and returns whether the consumer must be notified.
#[inline]
pub fn publish(mem: &impl IndexMemory, old: u32, new: u32) -> bool {
    let early = crate::planted!(PublishFence).then(|| mem.load_event());
    mem.store_prod(new);
    mem.fence();
    let event = early.unwrap_or_else(|| mem.load_event());
    // Unsigned distances, which are correct across the wrap at 2³².
    new.wrapping_sub(event) < new.wrapping_sub(old)
}

/// Arms a notification for anything produced after `cons`, and returns the producer index read
/// afterwards. The caller may wait only if that equals `cons`.
#[inline]
pub fn ask_for_event(mem: &impl IndexMemory, cons: u32) -> u32 {
    let early = crate::planted!(FinalCheckFence).then(|| mem.load_prod());
    mem.store_event(cons.wrapping_add(if crate::planted!(EventIndex) { 2 } else { 1 }));
    mem.fence();
    early.unwrap_or_else(|| mem.load_prod())
}
