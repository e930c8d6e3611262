//! Pinning a thread to one core, so that runs do not differ in their cores.

use rustix::thread::{CpuSet, sched_setaffinity};

/// Pins this thread, and threads it creates from now on, to one core. Without such a core, nothing
/// is pinned.
pub fn pin(core: usize) {
    let mut set = CpuSet::new();
    set.set(core);
    let _ = sched_setaffinity(None, &set);
}
