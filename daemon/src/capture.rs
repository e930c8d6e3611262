//! `pvio capture`: writes the packets of a NIC of a running driver domain to a file.

use crate::control::client::{connection_lost, request};
use crate::failure::{Failure, say, say_aside};
use crate::stop::{Stop, Wakeup, sleep};
use clap::Args;
use pvio_ports::wrappers::capture::SNAPLEN;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::path::Path;
use std::path::PathBuf;

/// Arguments of `pvio capture`.
#[derive(Debug, Clone, Args)]
pub struct CaptureArgs {
    /// The NIC, such as vif7.0 (the first NIC of guest 7); if left out, lists the NICs
    #[arg(value_name = "VIF", requires = "write")]
    pub vif: Option<String>,
    /// The file to write (pcapng); - is standard output
    #[arg(short = 'w', long, value_name = "FILE")]
    pub write: Option<PathBuf>,
    /// Stop after this number of packets, instead of at Ctrl-C
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Number of bytes to write of each packet; all if left out
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(14..))]
    pub snaplen: Option<u32>,
    /// The state directory of a pvio run, instead of that of the only running pvio serve or pvio
    /// run
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// There is no driver domain, it has no such NIC, or the file cannot be written.
pub fn run(args: &CaptureArgs) -> Result<(), Failure> {
    let state_dir = args.state_dir.as_deref();
    let (Some(vif), Some(path)) = (&args.vif, &args.write) else {
        let (_, mut names) = request(state_dir, "list")?;
        let mut all = String::new();
        names.read_to_string(&mut all).map_err(connection_lost)?;
        say!("{}", all.trim_end());
        return Ok(());
    };
    let wakeup = Wakeup::new()?;
    let stop = Stop::on_signal(wakeup.clone())?;
    let snaplen = args.snaplen.map_or(SNAPLEN, |n| n as usize);
    let count = args.count.unwrap_or(0);
    // Created before the request, so that a failure here does not start a capture for nothing.
    let mut file = create(path)?;
    let (stream, mut data) = request(state_dir, &format!("capture {vif} {snaplen} {count}"))?;
    let mut buffer = vec![0; 1 << 16];
    let (mut bytes, mut stopping) = (0, false);
    loop {
        if stop.is_requested() && !stopping {
            stopping = true;
            // The server still sends the packets captured until now and the end of the file.
            stream.shutdown(Shutdown::Write).map_err(connection_lost)?;
        }
        if data.buffer().is_empty() && !stopping {
            // Without a readable descriptor, a read would block until the next packet, although a
            // signal has arrived.
            if !sleep(&[stream.as_fd(), wakeup.as_fd()], None)? || wakeup.take() {
                continue;
            }
        }
        match data.read(&mut buffer).map_err(connection_lost)? {
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
    Failure::new(
        format!("the capture file {} cannot be written: {error}", path.display()),
        "name another with -w",
    )
}
