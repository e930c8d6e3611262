//! A guest's console: its output, and requests to its agent.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use crate::link::{Answer, Request};

/// Number of lines that are stored; enough for a panic with its call trace.
const KEPT: usize = 200;

/// The pseudoterminal that xenconsoled provides for a console.
pub struct Console {
    terminal: File,
    answers: Receiver<Answer>,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Console {
    /// Opens a terminal such as `/dev/pts/1`.
    ///
    /// # Errors
    /// It does not exist.
    pub fn open(terminal: &str) -> Result<Self> {
        const O_NOCTTY: i32 = 0o400;
        let mut options = File::options();
        options.read(true).write(true).custom_flags(O_NOCTTY);
        let terminal = options.open(terminal).with_context(|| terminal.to_owned())?;
        let mut mode = tcgetattr(&terminal)?;
        mode.make_raw();
        tcsetattr(&terminal, OptionalActions::Now, &mode)?;
        let (sender, answers) = channel();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (input, log) = (terminal.try_clone()?, Arc::clone(&lines));
        thread::spawn(move || listen(input, &sender, &log));
        Ok(Self { terminal, answers, lines })
    }

    /// Sends a request.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn send(&mut self, request: &Request) -> Result<()> {
        let line = format!("{}\n", request.line());
        self.terminal.write_all(line.as_bytes()).context("the guest's console")
    }

    /// Waits for the reply with that number; returns `None` after `patience`.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn answer(&self, number: u64, patience: Duration) -> Result<Option<Answer>> {
        let start = std::time::Instant::now();
        while let Some(left) = patience.checked_sub(start.elapsed()) {
            match self.answers.recv_timeout(left) {
                Ok(answer) if answer.number == number => return Ok(Some(answer)),
                // A late reply to a request that has timed out.
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return Ok(None),
                Err(RecvTimeoutError::Disconnected) => bail!("the guest is gone"),
            }
        }
        Ok(None)
    }

    /// Returns the last lines.
    pub fn tail(&self, n: usize) -> Vec<String> {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines[lines.len().saturating_sub(n)..].to_vec()
    }
}

/// Reads lines until the console is closed.
fn listen(mut input: File, answers: &Sender<Answer>, log: &Mutex<Vec<String>>) {
    let mut line = Vec::new();
    let mut bytes = [0; 4096];
    while let Ok(n @ 1..) = input.read(&mut bytes) {
        for byte in &bytes[..n] {
            if *byte != b'\n' {
                line.push(*byte);
                continue;
            }
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            line.clear();
            if let Some(answer) = Answer::parse(&text)
                && answers.send(answer).is_err()
            {
                return;
            }
            let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
            if log.len() == 2 * KEPT {
                log.drain(..KEPT);
            }
            log.push(text);
        }
    }
}
