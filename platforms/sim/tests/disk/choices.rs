//! What can happen, and what a run is made of.

use crate::daemon::{DaemonDo, Flaw};
use crate::guest::GuestDo;
use crate::hostile_back::Malice;
use crate::hostile_guest::Mischief;
use pvio_blkback::Policy;
use pvio_grant_table::DomId;
use pvio_sim::Sim;

/// Everything that can happen.
#[derive(Debug)]
pub enum Do {
    Daemon(DaemonDo),
    Guest(DomId, GuestDo),
    HostileGuest(Mischief),
    HostileBack(Malice),
    Tool(usize, ToolDo),
    /// A sector that a dead daemon was writing lands.
    Land(usize),
    /// A cached sector of a disk becomes safe.
    WriteBack(usize),
    /// The driver domain's process dies.
    CrashDaemon,
    StartDaemon,
    /// The driver domain dies, and what its disks had cached with it.
    KillDriver,
    RebuildDriver,
    KillGuest(usize),
    RebuildGuest(usize),
}

/// What the toolstack does about a disk.
#[derive(Debug)]
pub enum ToolDo {
    Create,
    Remove,
    /// Both ends are closed: clean up.
    Finish,
}

/// Whom to trust with a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Honest,
    HostileGuest,
    HostileBack,
}

/// Which faults a run has.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub crash: bool,
    /// The daemon takes the sessions of its predecessor over.
    pub resume: bool,
    pub kill_driver: bool,
    pub kill_guest: bool,
    pub remove: bool,
    /// The guest unloads its driver, and loads it again.
    pub close: bool,
    /// How likely each is; a worker's step is 200.
    pub often: u32,
    pub flaw: Flaw,
    /// Queues that a disk has at most, 1 if this is 0.
    pub queues: usize,
    /// How the driver domain reaches its guests' pages.
    pub policy: Policy,
}

impl Faults {
    /// Some of them: a run with few goes deeper than one with all.
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
            queues,
            policy,
        }
    }
}

/// Most queues of a disk that a daemon offers.
pub const QUEUES_OFFERED: usize = 4;

/// How many queues disks of a run have at most.
pub fn queues(sim: &mut Sim) -> usize {
    1 + sim.index(QUEUES_OFFERED)
}
