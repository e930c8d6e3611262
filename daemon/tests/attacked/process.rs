//! The process of a disk, with hostile code in it.

use crate::attempts::{Early, attempt};
use pvio_daemon::process::{disk, helper, run};
use pvio_hosted::Domain;
use rustix::process::{Signal, getpid};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// First argument of the program as a process of the supervisor; the next one is the directory of
/// the commands and the records.
pub const ARGUMENT: &str = "--attacked-process";
/// File with the command of hostile code.
pub const COMMAND: &str = "command";
/// File with the outcome.
pub const OUTCOME: &str = "outcome";
/// File with the number of image helpers that are still to die before they answer.
pub const HELPER_DEATHS: &str = "helper-deaths";
/// First byte of a command that was not begun, and of one that was.
pub const GIVEN: u8 = b'+';
const BEGUN: u8 = b'-';

/// Runs a process of the supervisor: `DIRECTORY [PLATFORM] KIND`.
pub fn run(args: &[String]) -> ExitCode {
    if args.last().is_some_and(|kind| kind == helper::COMMAND) {
        let path = format!("{}/{HELPER_DEATHS}", args[0]);
        let left: u32 = std::fs::read_to_string(&path).expect("file").parse().expect("a number");
        if left > 0 {
            std::fs::write(path, (left - 1).to_string()).expect("write");
            rustix::process::kill_process(getpid(), Signal::KILL).expect("kill");
        }
        run::image_helper().expect("helper");
        return ExitCode::SUCCESS;
    }
    let hostile = Hostile(Arc::new(Mutex::new(Some(Early::open(&args[0])))));
    tracing_subscriber::fmt().with_ansi(false).with_writer(move || hostile.clone()).init();
    let connection = run::connection().expect("a supervisor");
    match disk::serve::<Domain>(connection) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}

/// A log that starts the thread of the hostile code.
#[derive(Clone)]
struct Hostile(Arc<Mutex<Option<Early>>>);

impl Write for Hostile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let resumed = String::from_utf8_lossy(line).contains("session resumed");
        if resumed && let Some(early) = self.0.lock().expect("no panic").take() {
            std::thread::spawn(move || obey(&early));
        }
        io::stderr().write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Executes each command once.
fn obey(early: &Early) {
    loop {
        if let Some(name) = take(&early.command) {
            let error = attempt(&name, early).err();
            let errno = error.map_or(0, |error| error.raw_os_error().unwrap_or(-1));
            early.outcome.write_all_at(format!("{errno}\n").as_bytes(), 0).expect("outcome");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Returns a command that no process has begun, and marks it.
fn take(file: &File) -> Option<String> {
    let mut bytes = [0; 64];
    let len = file.read_at(&mut bytes, 0).ok()?;
    let line = std::str::from_utf8(bytes.get(1..len)?).ok()?.strip_suffix('\n')?.to_owned();
    (bytes[0] == GIVEN).then_some(())?;
    file.write_all_at(&[BEGUN], 0).ok()?;
    Some(line)
}
