//! The main thread of a device process.

use super::{Control, Received};
use crate::failure::Failure;
use crate::process::disk::has_ended;
use crate::process::messages::FromDevice;
use crate::stop::Wakeup;
use pvio_confinement::{Applied, Enforcement, ProcessKind, SystemCalls};
use pvio_runtime::Gate;
use pvio_xenbus::driver::Fault;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::task::Poll;

/// A session that a device process serves.
pub trait Serving {
    /// The kind of the process.
    const KIND: ProcessKind;
    /// The message with which it starts.
    type Serve: DeserializeOwned;
    /// A change of its settings.
    type Change: DeserializeOwned;
    /// What identifies it to another supervisor.
    type Identity: Serialize;

    /// Returns what another supervisor needs to go on with the session; `None` if it cannot.
    fn identity(&self) -> Option<(Self::Identity, Vec<BorrowedFd<'_>>)>;

    /// Returns the connection to a hypervisor that is a process.
    fn hypervisor(&self) -> Option<&OwnedFd>;

    /// Applies a change of the settings, with the descriptors beside it.
    fn change(&mut self, change: Self::Change, descriptors: Vec<OwnedFd>);

    /// Returns whether the threads of all queues wait at the gate. Called again until they do.
    ///
    /// # Errors
    /// A [`Fault`] ends the session.
    fn ready(&mut self) -> Result<Poll<()>, Fault>;

    /// Returns the reason why a queue has ended on its own.
    fn fault(&mut self) -> Option<Fault>;

    /// Returns the messages for the supervisor that are due; all that apply if it is a new one.
    fn messages(&mut self, new: bool) -> Vec<FromDevice<Self::Identity>>;

    /// Stops the queues, for a successor. Called again until it is ready.
    fn stop(&mut self) -> Poll<()>;
}

/// The layers of confinement of a process: those that it has, and what its filter does.
pub struct Filtered {
    /// The layers that were applied before there were threads.
    pub applied: Applied,
    /// What happens at a system call that is not allowed.
    pub enforcement: Enforcement,
}

/// Serves a session until the supervisor stops it or it has a fault. The gate is opened when system
/// calls are restricted.
///
/// # Errors
/// A system call failed.
pub fn serve<S: Serving>(
    mut control: Control,
    mut session: S,
    mut filtered: Filtered,
    (gate, wakeup): (&Gate, &Wakeup),
) -> Result<(), Failure> {
    let (mut ready, mut told, mut stopping, mut new) = (false, false, false, true);
    loop {
        while let Some(received) = control.receive::<S::Serve, S::Change>() {
            match received {
                Received::Change(change) => session.change(change, control.take_descriptors()),
                Received::Stop => stopping = true,
                Received::NewSupervisor => {
                    (told, new) = (false, true);
                    let (identity, descriptors) = session.identity().unzip();
                    control.hello(identity, &descriptors.unwrap_or_default());
                }
            }
        }
        if stopping {
            if session.stop().is_ready() {
                return Ok(());
            }
        } else {
            if !ready {
                match session.ready() {
                    Ok(Poll::Pending) => {}
                    Ok(Poll::Ready(())) => {
                        ready = true;
                        // All threads have their rings, and wait at the gate.
                        SystemCalls::of(S::KIND)
                            .install(filtered.enforcement, &mut filtered.applied);
                        gate.open();
                    }
                    Err(fault) => return end::<S>(control, fault),
                }
            }
            if ready && !std::mem::replace(&mut told, true) {
                let applied = filtered.applied.clone();
                control.send::<S::Identity>(&FromDevice::Confined(applied));
                control.send::<S::Identity>(&FromDevice::Ready);
            }
            if let Some(fault) = session.fault() {
                return end::<S>(control, fault);
            }
        }
        for message in session.messages(std::mem::take(&mut new)) {
            control.send(&message);
        }
        control.wait_also_for(wakeup, session.hypervisor().map(AsFd::as_fd))?;
        if session.hypervisor().is_some_and(has_ended) {
            return Err(Failure::new("the hypervisor has ended", ""));
        }
    }
}

/// Reports a fault and ends the process, which stops the session.
fn end<S: Serving>(mut control: Control, fault: Fault) -> Result<(), Failure> {
    control.send::<S::Identity>(&FromDevice::Fault(fault));
    Ok(())
}
