//! Start of a process in a separate PID namespace.

use crate::applied::{Missing, Outcome, Reason};
use crate::apply::namespaces::unshare;
use rustix::io::Errno;
use rustix::thread::UnshareFlags;
use std::io;
use std::process::{Child, Command};
use std::thread;

/// Starts a command as process 1 of a new PID namespace, so that it sees no other process. If the
/// namespace cannot be created, the command is started without; the outcome says why.
///
/// The namespace is that of the command only: a thread creates it, starts the command and ends. The
/// kernel drops signals to process 1 that it has no handler for, except SIGKILL and SIGSTOP of the
/// parent.
///
/// # Errors
/// The command cannot be started, or the system has no thread.
pub fn spawn(command: &mut Command) -> io::Result<(Child, Outcome)> {
    let run = || {
        let entered = match unshare(UnshareFlags::NEWPID) {
            Err(Errno::PERM) => Outcome::Missing(Missing {
                reason: Reason::NotPermitted,
                detail: "a PID namespace needs CAP_SYS_ADMIN".to_owned(),
            }),
            done => Outcome::of(done.map(|()| "process 1").map_err(|e| ("unshare", e))),
        };
        Ok((command.spawn()?, entered))
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("spawn".to_owned()).spawn_scoped(scope, run)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the starting thread panicked")))
    })
}
