//! Possible actions, and parameters of a run.

use crate::disk::actions::Flaw;
use pvio_blkback::Policy;
use pvio_sim::Sim;

/// Which participants of a disk follow the protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Honest,
    HostileGuest,
    HostileBack,
}

/// Enabled faults of a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub crash: bool,
    /// The daemon resumes the sessions of its predecessor.
    pub resume: bool,
    pub kill_driver: bool,
    pub kill_guest: bool,
    pub remove: bool,
    /// The guest unloads its driver, and loads it again.
    pub close: bool,
    /// Weight of each fault; a worker's step has 200.
    pub often: u32,
    pub flaw: Flaw,
    /// An action of one participant is interrupted by others: at one of this many of its accesses. 0 if
    /// never.
    pub interrupts: u64,
    /// Largest number of queues of a disk; 0 means 1.
    pub queues: usize,
    /// How the driver domain accesses its guests' pages.
    pub policy: Policy,
}

impl Faults {
    /// Selects some faults: a run with few reaches deeper states than one with all.
    pub fn some(sim: &mut Sim) -> Self {
        let (policy, queues) = (sim.pick(&Policy::ALL), queues(sim));
        let mut coin = || sim.one_in(2);
        Self {
            crash: coin(),
            resume: coin(),
            kill_driver: coin(),
            kill_guest: coin(),
            remove: coin(),
            close: coin(),
            often: sim.pick(&[1, 3, 10]),
            flaw: Flaw::None,
            interrupts: sim.pick(&[0, 0, 8, 32]),
            queues,
            policy,
        }
    }
}

/// Largest number of queues of a disk that a daemon offers.
pub const QUEUES_OFFERED: usize = 4;

/// Returns the largest number of queues of a run's disks.
pub fn queues(sim: &mut Sim) -> usize {
    1 + sim.index(QUEUES_OFFERED)
}
