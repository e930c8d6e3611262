//! Keeping a thread on one core, so that two runs differ in what they run and in nothing else.

use rustix::thread::{CpuSet, sched_setaffinity};

/// Keeps this thread, and threads it starts from now on, on one core. A machine without that core
/// is measured as it is.
pub fn pin(core: usize) {
    let mut set = CpuSet::new();
    set.set(core);
    let _ = sched_setaffinity(None, &set);
}
