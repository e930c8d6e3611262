//! Possible actions of the participants, and deliberate defects.

use pvio_grant_table::DomId;

/// Possible actions.
#[derive(Debug)]
pub enum Do {
    Daemon(DaemonDo),
    Guest(DomId, GuestDo),
    HostileGuest(Mischief),
    HostileBack(Malice),
    Tool(usize, ToolDo),
    /// A sector of a write that a dead daemon started reaches the cache.
    Land(usize),
    /// A cached sector of a disk is written to stable storage.
    WriteBack(usize),
    /// The driver domain's process ends.
    CrashDaemon,
    StartDaemon,
    /// The driver domain ends, and the cached data of its disks is lost.
    KillDriver,
    RebuildDriver,
    KillGuest(usize),
    RebuildGuest(usize),
}

/// Action of the toolstack on a disk.
#[derive(Debug)]
pub enum ToolDo {
    Create,
    Remove,
    /// Both ends are closed: remove the device.
    Finish,
}

/// Action of the daemon.
#[derive(Debug)]
pub enum DaemonDo {
    /// Process an event of xenstore.
    Event,
    /// A step of a device's worker.
    Work(usize, usize),
    /// A queue's engine completes an operation.
    Complete(usize, usize),
    /// A worker has ended on its own, and its driver is notified.
    Ended(usize),
    /// Read xenstore without an event.
    Spurious(usize),
}

/// Action of the guest.
#[derive(Debug)]
pub enum GuestDo {
    /// Process an event of xenstore.
    Event,
    /// A step of a queue's interrupt handler, or of the thread that polls.
    Work(usize),
    /// Prepare requests, and submit some of them.
    Issue(usize),
    /// Submit a prepared request.
    Begin(usize),
    /// Publish the submitted requests to the backend.
    Publish(usize),
    /// Check the results of completed requests.
    Check(usize),
    /// Unload the driver.
    Close,
    /// The driver is unloaded: load it again.
    Reload,
    /// Read xenstore without an event.
    Spurious,
    /// Notify the backend without a request.
    Knock(usize),
}

/// Action of the hostile backend.
#[derive(Debug)]
pub enum Malice {
    Offer,
    /// Maps the guest's ring, if it advertises one.
    Connect,
    /// Writes responses, to outstanding requests and to others.
    Answer,
    Scribble,
    Key,
    /// Unmaps the ring.
    Detach,
    Notify,
}

/// Action of the hostile guest.
#[derive(Debug)]
pub enum Mischief {
    /// Performs a correct handshake, so that there is a session to attack.
    Connect,
    /// Writes requests, valid and invalid ones.
    Ask,
    /// Writes random words to the ring's page.
    Scribble,
    /// Writes random values to xenstore keys.
    Key,
    /// Ends grants, whether or not they are used.
    Revoke,
    /// Closes its event channel.
    Hang,
    Notify,
}

/// Deliberate defect, to verify that the simulation finds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Flaw {
    #[default]
    None,
    /// Sleeps without requesting notifications and without the final check.
    NoFinalCheck,
    /// Publishes responses without notifications.
    NeverNotifies,
    /// Sometimes completes a write without executing it.
    ForgetsWrites,
    /// Completes flushes without executing them.
    ForgetsFlushes,
    /// Resumes the first queue of a session with the record of the second, and vice versa.
    SwapsRecords,
    /// Resumes only the first queue of a session.
    ResumesOneQueue,
}
