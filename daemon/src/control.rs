//! Control socket of a running driver domain: a Unix socket that only root and the driver domain's
//! user may use.
//!
//! A client sends one line. The server replies with one line, `ok` or `error` and the reason (after
//! a tab: what to do next), then
//! the data.
//!
//! | request | data |
//! |---|---|
//! | `list` | a line for each NIC, its name |
//! | `stats` | a line of JSON for the process with its budgets, and one for each device with its budgets and counters |
//! | `confinement` | a line of JSON for the supervisor, and one for each device: the process that serves it, the layers that it reported, and what `/proc` shows |
//! | `upgrade SECONDS BINARY` | none: the supervisor starts another binary, whose trial may take that long |
//! | `upgrade-status` | a line of JSON |
//! | `capture NAME SNAPLEN COUNT` | a pcapng file, until it has COUNT packets (0: no limit) or the client shuts down its sending side |
//!
//! The socket is created under a temporary name and then renamed. The daemon that starts last
//! receives the connections, and the name exists at every moment while one daemon replaces another.

mod capture;
pub mod client;
mod folder;

pub use folder::default_root;

use crate::failure::{Failure, one_line};
use crate::served::{Served, budgets};
use crate::upgrade::stage::Request;
use crate::upgrade::versions::probe;
use capture::Capture;
use pvio_confinement::Report;
use pvio_recordfile::{DirError, PrivateDir};
use pvio_runtime::LogLimit;
use rustix::net::sockopt::socket_peercred;
use rustix::process::geteuid;
use serde_json::json;
use std::fs::{self, Permissions};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Directory of the control socket of `pvio serve`.
pub const FOLDER: &str = "/run/pvio";
/// File name of the control socket.
pub const NAME: &str = "control.sock";

/// Maximum number of concurrent connections.
const MAX_CONNECTIONS: usize = 16;
/// Maximum length of a request: a path and some words.
const MAX_LINE: u64 = 5000;
const NO_UPGRADE: &str = "the supervisor cannot be upgraded: it is starting, or its devices are served by its threads\tuse --isolation=process";
/// Read and write timeout of a connection.
const IO_TIMEOUT: Duration = Duration::from_secs(5);
/// Interval at which a capture checks whether its client is still connected, and delay after a
/// failed accept.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// A listening control socket; its file is removed when this is dropped.
#[derive(Debug)]
pub struct Control {
    dir: PrivateDir,
    inode: u64,
}

impl Control {
    /// Creates the control socket in a directory, which is created if it does not exist and must be
    /// private to this user.
    ///
    /// # Errors
    /// The directory is not private, or the socket cannot be created there.
    pub fn listen(folder: &Path, served: &Served) -> Result<Self, Failure> {
        let path = folder.join(NAME);
        let refused =
            |e: DirError| Failure::of(e).context("the control socket cannot be created").as_input();
        let dir = PrivateDir::create(folder).map_err(refused)?;
        let failed = |e: io::Error| {
            let what = format!("the control socket {} cannot be created: {e}", path.display());
            Failure::new(what, "")
        };
        let temporary = format!("{NAME}.{}", std::process::id());
        dir.remove(&temporary).map_err(failed)?;
        let temporary = dir.by_descriptor(&temporary);
        let listener = UnixListener::bind(&temporary).map_err(failed)?;
        // Set before the rename. A client that connects earlier is rejected by its user id in
        // `respond`.
        fs::set_permissions(&temporary, Permissions::from_mode(0o600)).map_err(failed)?;
        let inode = fs::metadata(&temporary).map_err(failed)?.ino();
        fs::rename(&temporary, dir.by_descriptor(NAME)).map_err(failed)?;
        let served = served.clone();
        let connections = Arc::new(AtomicUsize::new(0));
        let failures = LogLimit::new();
        let serve = move || {
            for stream in listener.incoming() {
                match stream {
                    Ok(stream) => admit(stream, &served, &connections),
                    // For example because of a lack of file descriptors: retry after a delay.
                    Err(error) => {
                        if let Some(unlogged) = failures.admit() {
                            tracing::warn!(%error, unlogged, "accept on the control socket failed");
                        }
                        std::thread::sleep(POLL_INTERVAL);
                    }
                }
            }
        };
        std::thread::Builder::new().name("control".into()).spawn(serve).map_err(failed)?;
        Ok(Self { dir, inode })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Does not remove the socket of a successor.
        let found = fs::symlink_metadata(self.dir.by_descriptor(NAME));
        if found.is_ok_and(|found| found.ino() == self.inode) {
            let _ = self.dir.remove(NAME);
        }
    }
}

/// Serves a connection on a new thread, or drops it if there are `MAX_CONNECTIONS` already.
fn admit(stream: UnixStream, served: &Served, connections: &Arc<AtomicUsize>) {
    let (served, guard) = (served.clone(), Arc::clone(connections));
    if connections.fetch_add(1, Ordering::AcqRel) >= MAX_CONNECTIONS {
        connections.fetch_sub(1, Ordering::AcqRel);
        return;
    }
    let work = move || {
        if let Err(error) = respond(&stream, &served, &guard) {
            tracing::debug!(%error, "a client of the control socket disconnected");
        }
        guard.fetch_sub(1, Ordering::AcqRel);
    };
    if std::thread::Builder::new().name("control-answer".into()).spawn(work).is_err() {
        connections.fetch_sub(1, Ordering::AcqRel);
    }
}

fn respond(mut stream: &UnixStream, served: &Served, connections: &AtomicUsize) -> io::Result<()> {
    let uid = socket_peercred(stream)?.uid;
    if !uid.is_root() && uid != geteuid() {
        return writeln!(
            stream,
            "error permission denied: only root and the user of the driver domain may connect"
        );
    }
    stream.set_read_timeout(Some(IO_TIMEOUT))?;
    stream.set_write_timeout(Some(IO_TIMEOUT))?;
    let mut line = String::new();
    BufReader::new(stream.take(MAX_LINE)).read_line(&mut line)?;
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        ["list"] => {
            writeln!(stream, "ok")?;
            served.nics().iter().try_for_each(|name| writeln!(stream, "{name}"))
        }
        ["stats"] => {
            writeln!(stream, "ok")?;
            let mut out = BufWriter::new(stream);
            let mut process = served.process();
            let count = connections.load(Ordering::Relaxed) as u64;
            process.extend(budgets([("control-connections", count, MAX_CONNECTIONS as u64)]));
            writeln!(out, "{}", json!({ "process": std::process::id(), "budgets": process }))?;
            served.counters().iter().try_for_each(|device| writeln!(out, "{device}"))?;
            out.flush()
        }
        ["confinement"] => {
            let supervisor = Report::of(std::process::id())?;
            writeln!(stream, "ok")?;
            let mut out = BufWriter::new(stream);
            let pid = supervisor.pid;
            writeln!(out, "{}", json!({ "pid": pid, "process": supervisor }))?;
            served.confinement().iter().try_for_each(|device| writeln!(out, "{device}"))?;
            out.flush()
        }
        ["upgrade-status"] => match served.upgrade() {
            Some(upgrade) => writeln!(stream, "ok\n{}", json!(upgrade.status())),
            None => writeln!(stream, "error {NO_UPGRADE}"),
        },
        ["upgrade", timeout, binary] => {
            let (Some(upgrade), Ok(timeout)) = (served.upgrade(), timeout.parse()) else {
                return writeln!(stream, "error {NO_UPGRADE}");
            };
            let binary = PathBuf::from(binary);
            if let Err(failure) = probe(&binary) {
                let (what, remedy) = (one_line(&failure.what), one_line(&failure.remedy));
                return writeln!(stream, "error {what}\t{remedy}");
            }
            tracing::info!(binary = %binary.display(), "upgrade requested");
            match upgrade.set_request(Request { binary, timeout }) {
                Ok(()) => {
                    // The supervisor ends this thread, too. A client that has gone changes nothing.
                    let told = writeln!(stream, "ok");
                    upgrade.confirm();
                    told
                }
                Err(why) => writeln!(stream, "error {why}\ttry again later"),
            }
        }
        ["capture", name, snaplen, count] => {
            let (Ok(snaplen), Ok(count)) = (snaplen.parse(), count.parse()) else {
                return writeln!(stream, "error invalid request: not a number");
            };
            let Some(settings) = served.nic(name) else {
                let names = served.nics().join(", ");
                let known = if names.is_empty() { "none".into() } else { names };
                let name = one_line(name);
                return writeln!(
                    stream,
                    "error the NIC {name} does not exist\tname one of: {known}"
                );
            };
            match Capture::begin(&settings, snaplen) {
                Err(error) => writeln!(stream, "error {name}: {error}"),
                Ok(mut capture) => {
                    tracing::info!(nic = name, "capture started");
                    let done = capture.send(stream, name, snaplen, count);
                    tracing::info!(nic = name, lost = capture.lost(), "capture ended");
                    done
                }
            }
        }
        _ => writeln!(stream, "error unknown request\tuse the same version of pvio"),
    }
}
