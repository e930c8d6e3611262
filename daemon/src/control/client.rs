//! Client of a driver domain's control socket.

use super::{FOLDER, NAME, default_root};
use crate::failure::Failure;
use pvio_recordfile::PrivateDir;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// Sends a request to the driver domain of that state directory, or to the only one that is
/// running. Returns the connection, and its reader at the start of the data.
///
/// # Errors
/// No driver domain replies, several do, or it rejects the request.
pub fn request(
    state_dir: Option<&Path>,
    line: &str,
) -> Result<(UnixStream, BufReader<UnixStream>), Failure> {
    let mut stream = match state_dir {
        Some(dir) => connect(&dir.join(NAME)).map_err(|e| {
            Failure::input(
                format!("no driver domain responds in {}: {e}", dir.display()),
                "name the --state-dir of a running pvio run",
            )
        })?,
        None => find()?,
    };
    writeln!(stream, "{line}").map_err(connection_lost)?;
    let mut reader = BufReader::new(stream.try_clone().map_err(connection_lost)?);
    let mut line = String::new();
    reader.read_line(&mut line).map_err(connection_lost)?;
    match line.trim_end().split_once(' ') {
        None if line == "ok\n" => Ok((stream, reader)),
        Some(("error", why)) => {
            let (what, remedy) = why.split_once('\t').unwrap_or((why, ""));
            Err(Failure::input(what, remedy))
        }
        _ => Err(Failure::new(
            "the driver domain did not respond",
            "try again later: it serves a limited number of connections",
        )),
    }
}

fn connect(path: &Path) -> io::Result<UnixStream> {
    UnixStream::connect(path)
}

/// Returns a connection to the only running driver domain: that of `pvio serve`, or of a `pvio run`
/// of this user.
fn find() -> Result<UnixStream, Failure> {
    let root = default_root();
    // A directory that other users can write to is ignored.
    let private = PrivateDir::open(&root).ok().and_then(|_| std::fs::read_dir(root).ok());
    let machines = private.into_iter().flatten().flatten().map(|machine| machine.path());
    let sockets = [PathBuf::from(FOLDER)].into_iter().chain(machines);
    let sockets = sockets.filter(|folder| PrivateDir::open(folder).is_ok());
    let sockets = sockets.map(|folder| folder.join(NAME));
    let found = |socket: PathBuf| connect(&socket).ok().map(|stream| (socket, stream));
    let mut found: Vec<(PathBuf, UnixStream)> = sockets.filter_map(found).collect();
    match (found.pop(), &found[..]) {
        (Some((_, stream)), []) => Ok(stream),
        (None, _) => Err(Failure::input(
            "no driver domain responds",
            "start pvio serve or pvio run, use root for a pvio serve, or name another with --state-dir",
        )),
        (Some((last, _)), others) => {
            let sockets = others.iter().map(|(socket, _)| socket).chain([&last]);
            let folders =
                sockets.filter_map(|socket| socket.parent()).map(|dir| dir.display().to_string());
            let folders: Vec<String> = folders.collect();
            Err(Failure::input(
                format!("several driver domains respond: {}", folders.join(", ")),
                "choose one with --state-dir",
            ))
        }
    }
}

/// Returns the failure for a connection that ended in the middle of a reply.
#[must_use]
#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
pub fn connection_lost(error: io::Error) -> Failure {
    Failure::new(format!("the connection to the driver domain was lost: {error}"), "")
}
