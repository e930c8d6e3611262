//! `pvio capture`: what passes through a NIC of a running driver domain, as a file.

use crate::cli::CaptureArgs;
use crate::control::{FOLDER, NAME};
use crate::domain::stop::{Bell, Stop, sleep};
use crate::failure::{Failure, say, say_aside};
use crate::machine::home::default_root;
use pvio_netback::port::capture::SNAPLEN;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// Does it.
///
/// # Errors
/// When there is no driver domain, or it has no such NIC, or the file cannot be written.
pub fn run(args: &CaptureArgs) -> Result<(), Failure> {
    let (Some(vif), Some(path)) = (&args.vif, &args.write) else {
        let (_, mut names) = ask(args, "list")?;
        let mut all = String::new();
        names.read_to_string(&mut all).map_err(gone)?;
        say!("{}", all.trim_end());
        return Ok(());
    };
    let bell = Bell::new()?;
    let stop = Stop::on_signal(bell.clone())?;
    let snaplen = args.snaplen.map_or(SNAPLEN, |n| n as usize);
    let count = args.count.unwrap_or(0);
    // The file first: a NIC is not looked at for nothing.
    let mut file = create(path)?;
    let (stream, mut data) = ask(args, &format!("capture {vif} {snaplen} {count}"))?;
    let mut buffer = vec![0; 1 << 16];
    let (mut bytes, mut told) = (0, false);
    loop {
        if stop.is_told() && !told {
            told = true;
            // What was captured until now, and the end of the file, are still to come.
            stream.shutdown(Shutdown::Write).map_err(gone)?;
        }
        if data.buffer().is_empty() && !told {
            sleep(&[stream.as_fd(), bell.as_fd()], None)?;
            if bell.take() {
                continue;
            }
        }
        match data.read(&mut buffer).map_err(gone)? {
            0 => break,
            n => {
                let written = file.write_all(&buffer[..n]).and_then(|()| file.flush());
                written.map_err(|e| not_written(path, &e))?;
                bytes += n;
            }
        }
    }
    say_aside!("{bytes} bytes written");
    Ok(())
}

fn create(path: &Path) -> Result<Box<dyn Write>, Failure> {
    if path == Path::new("-") {
        return Ok(Box::new(io::stdout()));
    }
    let file = File::create(path).map_err(|e| not_written(path, &e).as_input())?;
    Ok(Box::new(file))
}

fn not_written(path: &Path, error: &io::Error) -> Failure {
    Failure::new(format!("{} cannot be written: {error}", path.display()), "name another with -w")
}

fn gone(error: io::Error) -> Failure {
    Failure::new(format!("the driver domain is gone: {error}"), "")
}

/// Asks the driver domain; its answer is about to follow in the second.
fn ask(args: &CaptureArgs, question: &str) -> Result<(UnixStream, BufReader<UnixStream>), Failure> {
    let mut stream = match &args.state_dir {
        Some(dir) => knock(&dir.join(NAME)).map_err(|e| {
            Failure::input(
                format!("no driver domain answers in {}: {e}", dir.display()),
                "name the --state-dir of a running pvio run",
            )
        })?,
        None => find()?,
    };
    writeln!(stream, "{question}").map_err(gone)?;
    let mut answer = BufReader::new(stream.try_clone().map_err(gone)?);
    let mut line = String::new();
    answer.read_line(&mut line).map_err(gone)?;
    match line.trim_end().split_once(' ') {
        None if line == "ok\n" => Ok((stream, answer)),
        Some(("error", why)) => Err(Failure::of(why).as_input()),
        _ => Err(Failure::new("the driver domain did not answer", "too many ask at once, perhaps")),
    }
}

fn knock(path: &Path) -> io::Result<UnixStream> {
    UnixStream::connect(path)
}

/// The one driver domain there is: that of `pvio serve`, or of a `pvio run` of this user's.
fn find() -> Result<UnixStream, Failure> {
    let machines = std::fs::read_dir(default_root()).into_iter().flatten().flatten();
    let doors = machines.map(|machine| machine.path().join(NAME));
    let doors = [Path::new(FOLDER).join(NAME)].into_iter().chain(doors);
    let open = |door: PathBuf| knock(&door).ok().map(|stream| (door, stream));
    let mut open: Vec<(PathBuf, UnixStream)> = doors.filter_map(open).collect();
    match (open.pop(), &open[..]) {
        (Some((_, stream)), []) => Ok(stream),
        (None, _) => Err(Failure::input(
            "no driver domain answers",
            "start pvio serve or pvio run; root sees those of pvio serve, --state-dir names another",
        )),
        (Some((last, _)), others) => {
            let doors = others.iter().map(|(door, _)| door).chain([&last]);
            let folders =
                doors.filter_map(|door| door.parent()).map(|dir| dir.display().to_string());
            let folders: Vec<String> = folders.collect();
            Err(Failure::input(
                format!("several driver domains answer: {}", folders.join(", ")),
                "choose one with --state-dir",
            ))
        }
    }
}
