//! The two-level event channel ABI: a pending and a mask bit for each port in the shared info page
//! (`struct shared_info`, `evtchn_pending` and `evtchn_mask`: 64 words of 64 bits each on 64-bit
//! guests, `EVTCHN_2L_NR_CHANNELS` = 4096 ports).
//!
//! Each vCPU has a selector level above (`evtchn_pending_sel`), which narrows a scan; a platform
//! that reports the port in another way does not need it.
//!
//! A guest kernel sets mask bits; [`EventPage::raise`] respects them. No device here masks a port: a
//! worker that does not wait is not woken, because its event stays pending.

use crate::Port;
use core::sync::atomic::Ordering;
use pvio_ring::shm::{Region, SharedMemory};

/// Number of ports of a 64-bit guest.
pub const PORTS: u32 = 4096;
/// Size of the pending bits in bytes, and of the mask bits that follow.
const BITS: usize = 512;
/// Size of the bits in shared memory, in bytes.
pub const SIZE: usize = 2 * BITS;

/// The pending and mask bits of one domain, shared with all that raise events in it.
#[derive(Clone, Debug)]
pub struct EventPage<M> {
    mem: M,
}

impl<M: SharedMemory> EventPage<M> {
    /// Uses the bits in the first [`SIZE`] bytes of `mem`.
    #[must_use]
    pub const fn new(mem: M) -> Self {
        Self { mem }
    }

    /// Marks an event pending (the sender's side). Returns whether the receiver must be woken: only
    /// if none was pending and the port is not masked.
    #[inline]
    pub fn raise(&self, port: Port) -> bool {
        let Some((at, bit)) = place(port) else { return false };
        let before = self.mem.fetch_or_u64(at, bit).unwrap_or(bit);
        before & bit == 0 && !self.masked(port)
    }

    /// Clears the pending bit and returns whether it was set.
    #[inline]
    pub fn take(&self, port: Port) -> bool {
        let Some((at, bit)) = place(port) else { return false };
        // Read first: the cache line stays in the shared state while nothing is pending.
        if !self.pending(port) {
            return false;
        }
        self.mem.fetch_and_u64(at, !bit).unwrap_or_default() & bit != 0
    }

    /// Marks an event pending and calls `wake` if the receiver must be woken: the sender's half of
    /// the protocol with [`receive`](Self::receive).
    #[inline]
    pub fn send(&self, port: Port, wake: impl FnOnce()) {
        if self.raise(port) {
            wake();
        }
    }

    /// Resets the receiver's wake-up with `reset`, then takes the event. In the other order, an event
    /// between the two would stay pending without a wake-up, and every later one would find it
    /// pending.
    ///
    /// # Errors
    /// The error of `reset`; no event is taken.
    #[inline]
    pub fn receive<E>(&self, port: Port, reset: impl FnOnce() -> Result<(), E>) -> Result<bool, E> {
        reset()?;
        Ok(self.take(port))
    }

    /// Returns whether an event is pending.
    #[inline]
    #[must_use]
    pub fn pending(&self, port: Port) -> bool {
        let Some((at, bit)) = place(port) else { return false };
        self.mem.load_u64(at, Ordering::SeqCst).unwrap_or_default() & bit != 0
    }

    /// Returns whether the port is masked.
    #[inline]
    #[must_use]
    pub fn masked(&self, port: Port) -> bool {
        let Some((at, bit)) = place(port) else { return true };
        let at = at.wrapping_add(BITS);
        self.mem.load_u64(at, Ordering::SeqCst).unwrap_or(bit) & bit != 0
    }

    /// Clears both bits: the port was closed, or will be reused.
    pub fn clear(&self, port: Port) {
        if let Some((at, bit)) = place(port) {
            self.mem.fetch_and_u64(at, !bit);
            self.mem.fetch_and_u64(at.wrapping_add(BITS), !bit);
        }
    }
}

#[inline]
fn place(port: Port) -> Option<(usize, u64)> {
    if port.0 == 0 || port.0 >= PORTS {
        return None;
    }
    let at = (port.0 >> 6) as usize;
    Some((at.wrapping_mul(8), 1_u64.wrapping_shl(port.0 & 63)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pvio_ring::shm::HeapMemory;

    /// Sets a port's mask bit, as a guest kernel does.
    fn mask(memory: &HeapMemory, port: Port) {
        let (at, bit) = place(port).unwrap();
        memory.fetch_or_u64(at.wrapping_add(BITS), bit).unwrap();
    }

    #[test]
    fn raise_on_masked_port_sets_event_pending_without_wakeup() {
        let memory = HeapMemory::pages(1);
        let page = EventPage::new(memory.clone());
        let port = Port(4095);
        mask(&memory, port);
        assert!(!page.raise(port));
        assert!(page.pending(port) && page.take(port));
    }

    #[test]
    fn event_bits_of_ports_are_independent() {
        let memory = HeapMemory::pages(1);
        let page = EventPage::new(memory.clone());
        assert!(page.raise(Port(63)));
        mask(&memory, Port(64));
        assert!(!page.pending(Port(64)) && !page.pending(Port(62)) && !page.masked(Port(63)));
        page.clear(Port(63));
        assert!(!page.pending(Port(63)) && page.masked(Port(64)));
        page.clear(Port(64));
        assert!(!page.masked(Port(64)));
    }

    #[test]
    fn invalid_port_is_ignored() {
        let page = EventPage::new(HeapMemory::pages(1));
        for port in [Port(0), Port(PORTS), Port(u32::MAX)] {
            assert!(!page.raise(port) && !page.take(port) && !page.pending(port));
            page.clear(port);
        }
        assert!(!page.pending(Port(1)) && !page.masked(Port(1)));
    }
}
