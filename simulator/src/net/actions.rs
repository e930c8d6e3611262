//! Possible actions of the participants, and deliberate defects.

use pvio_grant_table::DomId;

/// Possible actions.
#[derive(Debug)]
pub enum Do {
    Daemon(DaemonDo),
    Guest(DomId, GuestDo),
    CrashDaemon,
    StartDaemon,
    KillDriver,
    RebuildDriver,
    KillGuest(usize),
    RebuildGuest(usize),
    Create(usize),
    Remove(usize),
    Finish(usize),
}

/// Action of the daemon.
#[derive(Debug)]
pub enum DaemonDo {
    Event,
    Work(usize, usize),
    Spurious(usize),
}

/// Action of the guest.
#[derive(Debug)]
pub enum GuestDo {
    Event,
    /// A step of the participant that receives frames.
    Work,
    Send,
    Publish,
    /// Change a setting that the backend has to apply.
    Change,
    /// Write the setting to xenstore, if it is one that is requested there.
    Tell,
    Close,
    Reload,
    Spurious,
}

/// Deliberate defect, to verify that the simulation finds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Flaw {
    #[default]
    None,
    /// Workers sleep without requesting notifications and without the final check.
    NoFinalCheck,
    /// Resumes the first queue of a session with the record of the second, and vice versa.
    SwapsRecords,
    /// Resumes only the first queue of a session.
    ResumesOneQueue,
}
