//! The notification protocol of a shared ring, by itself.
//!
//! Each direction of a ring has a *producer index* and an *event index* in shared memory. It works
//! in three phases:
//!
//! 1. **Produce.** Write slots, then publish the producer index (`Release`). A full fence, then
//!    read the peer's event index: notify only if it lies in what was just published.
//! 2. **Consume.** Read the producer index (`Acquire`), then the slots up to it. No fence, no
//!    notification: while the consumer is awake the event index stays behind.
//! 3. **Sleep.** Set the event index to one past the consumed index, a full fence, and *look at
//!    the producer index once more* (the final check). Only if nothing came may the consumer wait.
//!
//! The racy line is the pair of fences: producer "store prod, fence, load event" against consumer
//! "store event, fence, load prod". With both fences at least one side sees the other's store, so
//! either the producer notifies or the consumer does not sleep. Leave out one fence or the final
//! check, and a wake-up is lost; `tests/loom_notify.rs` has the model checker find just that.
//!
//! Everything here is generic over [`IndexMemory`], so that the very code that runs is the code
//! that is model-checked. (`ring.h`: `RING_PUSH_*_AND_CHECK_NOTIFY`, `RING_FINAL_CHECK_FOR_*`.)

/// One direction of a ring's shared indices: a producer index and the consumer's event index.
pub trait IndexMemory {
    /// Reads the producer index; the slots before it must be readable afterwards (`Acquire`).
    fn load_prod(&self) -> u32;
    /// Publishes the producer index; the slots before it must be written already (`Release`).
    fn store_prod(&self, value: u32);
    /// Reads the event index.
    fn load_event(&self) -> u32;
    /// Writes the event index.
    fn store_event(&self, value: u32);
    /// A full (store-to-load) fence.
    fn fence(&self);
}

/// Publishes slots `old..new` and tells whether the consumer must be notified.
#[inline]
pub fn publish(mem: &impl IndexMemory, old: u32, new: u32) -> bool {
    mem.store_prod(new);
    mem.fence();
    // Unsigned distances, right across the wrap at 2³².
    new.wrapping_sub(mem.load_event()) < new.wrapping_sub(old)
}

/// Asks to be notified of anything produced past `cons`, and returns the producer index as it is
/// after asking. The caller may wait only if that equals `cons`.
#[inline]
pub fn ask_for_event(mem: &impl IndexMemory, cons: u32) -> u32 {
    mem.store_event(cons.wrapping_add(1));
    mem.fence();
    mem.load_prod()
}
