//! Starting the process of a session.

use super::super::channel::ChannelError;
use super::super::child::Process;
use super::super::messages::{Descriptor, Start, ToDevice};
use super::{AT_ONCE, Environment, Launch, Session};
use pvio_recordfile::RecordDir;
use pvio_ring::error::Report;
use pvio_xenbus::driver::Fault;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long the kernel may take to finish the I/O of a dead process. Its disk drivers time a command
/// out after 30 s.
const FENCE_TIMEOUT: Duration = Duration::from_secs(90);

/// Starts a process for a session.
pub(super) fn launch<S: Session>(
    device: &str,
    environment: &Environment,
    session: &S,
    (start, died): (Start, Option<Instant>),
) -> Result<Process, Fault> {
    let fence = match (&environment.records, session.fence()) {
        (Some(records), Some(name)) => Some(pass_fence(records, &name)?),
        _ => None,
    };
    let io = died.map(|died| died.elapsed());
    let listen = environment.registry.listen(device).map_err(|e| process_fault(&e))?;
    let Launch { mut descriptors, serve } = session.launch(start, fence, io)?;
    descriptors.push((Descriptor::Listen, listen));
    let name = format!("pvio: {device}");
    let program = environment.program.with_command(environment.platform).with_command(S::COMMAND);
    let process = Process::spawn(&program, &name, true).map_err(|e| process_fault(&e))?;
    let sent = send_all::<S>(&process, &descriptors, serve);
    sent.map_err(|e| {
        Fault::new("device-process", format!("it cannot be started: {}", Report(&e)))
    })?;
    Ok(process)
}

/// Sends the descriptors and the message of a session. The copies of the descriptors are closed by
/// the caller: the supervisor must not hold a fence open.
fn send_all<S: Session>(
    process: &Process,
    descriptors: &[(Descriptor, OwnedFd)],
    serve: S::Serve,
) -> Result<(), ChannelError> {
    for part in descriptors.chunks(AT_ONCE) {
        let (purposes, all): (Vec<_>, Vec<_>) =
            part.iter().map(|(purpose, fd)| (purpose.clone(), fd.as_fd())).unzip();
        process.send(&ToDevice::<S::Serve, S::Change>::Descriptors(purposes), &all)?;
    }
    process.send(&ToDevice::<S::Serve, S::Change>::Serve(Box::new(serve)), &[])
}

/// Waits until the I/O of earlier processes has ended, and returns the next fence.
fn pass_fence(records: &RecordDir, name: &str) -> Result<OwnedFd, Fault> {
    let failed = |e: io::Error| {
        let text = format!("the I/O of an earlier process has not ended: {e}");
        let remedy =
            "check whether the storage responds, then detach the device and attach it again";
        Fault::new("image-fence", text).with_remedy(remedy)
    };
    let fence = records.fence(name).map_err(failed)?;
    if !fence.wait(FENCE_TIMEOUT).map_err(failed)? {
        return Err(failed(io::ErrorKind::TimedOut.into()));
    }
    fence.hold().map_err(failed)
}

/// Returns the path at which a child of this process executes an open file.
pub(super) fn binary_path(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

pub(super) fn process_fault(error: &io::Error) -> Fault {
    let text = format!("the device process cannot be started: {error}");
    Fault::new("device-process", text)
}
