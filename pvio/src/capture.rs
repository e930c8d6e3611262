//! `pvio capture`: what passes through a NIC of a running driver domain, as a file.

use crate::cli::CaptureArgs;
use crate::control::ask::{ask, gone};
use crate::domain::stop::{Bell, Stop, sleep};
use crate::failure::{Failure, say, say_aside};
use pvio_netback::port::capture::SNAPLEN;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::path::Path;

/// Does it.
///
/// # Errors
/// When there is no driver domain, or it has no such NIC, or the file cannot be written.
pub fn run(args: &CaptureArgs) -> Result<(), Failure> {
    let door = args.state_dir.as_deref();
    let (Some(vif), Some(path)) = (&args.vif, &args.write) else {
        let (_, mut names) = ask(door, "list")?;
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
    let (stream, mut data) = ask(door, &format!("capture {vif} {snaplen} {count}"))?;
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
