//! What needs an allocator.

use pvio_ring::FrontRing;
use pvio_ring::shm::HeapMemory;

/// A ring of several pages from the heap.
pub fn ring_on_the_heap() -> bool {
    FrontRing::init(HeapMemory::pages(4), 112).is_ok_and(|ring| ring.free() == 128)
}
