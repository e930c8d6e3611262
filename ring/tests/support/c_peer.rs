//! A compiled peer in a separate process.

use std::io::{ErrorKind, Read, Write};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

/// Time after which an exchange is considered stuck: it needs about a second.
const STUCK: Duration = Duration::from_secs(60);

/// A peer in another process, with a pipe in each direction as the event channel.
pub struct Peer {
    child: Arc<Mutex<Child>>,
    to: ChildStdin,
    from: ChildStdout,
    says: ChildStderr,
    stuck: Arc<AtomicBool>,
    /// Dropped when the test has succeeded, which ends the watchdog.
    _watched: mpsc::Sender<()>,
    pub waits: u64,
}

impl Peer {
    /// Starts the peer, and a watchdog that kills it if it does not exit in time.
    pub fn start(command: &mut Command) -> Self {
        let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = pipes.spawn().expect("the peer was just compiled");
        let (to, from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let says = child.stderr.take().unwrap();
        let child = Arc::new(Mutex::new(child));
        let stuck = Arc::new(AtomicBool::new(false));
        let (watched, end) = mpsc::channel::<()>();
        let (its_child, its_stuck) = (Arc::clone(&child), Arc::clone(&stuck));
        std::thread::spawn(move || {
            if end.recv_timeout(STUCK) == Err(mpsc::RecvTimeoutError::Timeout) {
                its_stuck.store(true, Ordering::SeqCst);
                // Its pipes close, so that a thread that waits for it returns.
                let _ = its_child.lock().unwrap().kill();
            }
        });
        Self { child, to, from, says, stuck, _watched: watched, waits: 0 }
    }

    /// Wakes the peer.
    pub fn notify(&mut self) {
        match self.to.write_all(b"!") {
            // The peer has finished and exited: it needs no notification.
            Err(e) if e.kind() == ErrorKind::BrokenPipe => {}
            other => other.expect("a pipe to the peer"),
        }
    }

    /// Sleeps until the peer notifies.
    pub fn wait(&mut self) {
        self.waits += 1;
        let got = self.from.read(&mut [0; 64]).expect("a pipe from the peer");
        if got == 0 {
            panic!("{}", self.complaint());
        }
    }

    /// Waits for the peer to exit, and returns its output.
    pub fn finish(mut self) -> String {
        let mut says = String::new();
        self.says.read_to_string(&mut says).expect("what the peer says");
        let status = self.child.lock().unwrap().wait().expect("the peer's end");
        assert!(
            !self.stuck.load(Ordering::SeqCst),
            "notification was lost: the peer did not wake up"
        );
        assert!(status.success(), "the peer failed: {says}");
        says
    }

    fn complaint(&mut self) -> String {
        if self.stuck.load(Ordering::SeqCst) {
            return format!("notification was lost: both sides slept for {STUCK:?}");
        }
        let mut says = String::new();
        let _ = self.says.read_to_string(&mut says);
        format!("the peer went away: {says}")
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // A failed test leaves no process behind. After a normal exit there is none to kill.
        if let Ok(mut child) = self.child.lock() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
