//! Connections to the server of a disk. Its process has no network: the supervisor makes them.

use crate::stop::Wakeup;
use pvio_runtime::{Notify, Task};
use pvio_storage::engine::nbd::{Dial, Network};
use pvio_storage::image::spec::NbdServer;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

/// How long the process waits for a connection. The client tries again for as long as its requests
/// may wait, also if there is no supervisor for some time.
const ANSWER: Duration = Duration::from_secs(8);
/// Delay of each connection, which bounds the rate at which a process can make the supervisor connect.
const DELAY: Duration = Duration::from_millis(10);

/// Asks the supervisor for connections.
pub struct SupervisorDial {
    request: Mutex<Request>,
    changed: Condvar,
    wakeup: Wakeup,
}

enum Request {
    None,
    /// The supervisor was not asked yet.
    New,
    Sent,
    Answered(io::Result<OwnedFd>),
}

impl SupervisorDial {
    /// Creates one that signals `wakeup` when the supervisor is to be asked.
    pub const fn new(wakeup: Wakeup) -> Self {
        Self { request: Mutex::new(Request::None), changed: Condvar::new(), wakeup }
    }

    fn request(&self) -> MutexGuard<'_, Request> {
        self.request.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether the supervisor is to be asked now.
    pub fn take_request(&self) -> bool {
        let mut request = self.request();
        let is_new = matches!(*request, Request::New);
        if is_new {
            *request = Request::Sent;
        }
        is_new
    }

    /// Notes that another supervisor has connected, which was not asked.
    pub fn set_unsent(&self) {
        let mut request = self.request();
        if matches!(*request, Request::Sent) {
            *request = Request::New;
        }
    }

    /// Passes the supervisor's answer on. Without effect if no request is waiting.
    pub fn answer(&self, answer: io::Result<OwnedFd>) {
        let mut request = self.request();
        if matches!(*request, Request::New | Request::Sent) {
            *request = Request::Answered(answer);
            self.changed.notify_one();
        }
    }
}

impl Dial for SupervisorDial {
    fn dial(&self, _: &NbdServer) -> io::Result<OwnedFd> {
        let until = Instant::now() + ANSWER;
        let mut request = self.request();
        *request = Request::New;
        self.wakeup.wake();
        loop {
            match std::mem::replace(&mut *request, Request::None) {
                Request::Answered(answer) => return answer,
                waiting => *request = waiting,
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                *request = Request::None;
                let text = "the supervisor does not connect to the server";
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            let waited = self.changed.wait_timeout(request, left);
            request = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The supervisor's side: at most one connection is being made.
#[derive(Default)]
pub struct Dialing(Option<Task<io::Result<OwnedFd>>>);

impl Dialing {
    /// Begins to connect; `wake` is called when [`poll`](Self::poll) has the outcome.
    pub fn begin(&mut self, server: NbdServer, wake: Notify) {
        if self.0.is_none() {
            let connect = move || {
                std::thread::sleep(DELAY);
                Network.dial(&server)
            };
            // Without a thread there is no answer, and the process asks again.
            self.0 = Task::spawn("connect-disk", connect, move || wake()).ok();
        }
    }

    /// Returns the outcome, once.
    pub fn poll(&mut self) -> Option<io::Result<OwnedFd>> {
        let Poll::Ready(outcome) = self.0.as_mut()?.poll() else { return None };
        self.0 = None;
        Some(outcome.map_err(io::Error::other).flatten())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn server() -> NbdServer {
        NbdServer::Unix("/nowhere".into())
    }

    #[test]
    fn request_is_sent_to_each_supervisor_until_it_is_answered() {
        let wakeup = Wakeup::new().unwrap();
        let dial = Arc::new(SupervisorDial::new(wakeup.clone()));
        dial.answer(Err(io::ErrorKind::NotFound.into()));
        assert!(!dial.take_request());
        let client = Arc::clone(&dial);
        let client = std::thread::spawn(move || client.dial(&server()));
        while !wakeup.take() {
            std::thread::yield_now();
        }
        assert!(dial.take_request() && !dial.take_request());
        dial.set_unsent();
        assert!(dial.take_request());
        dial.answer(Err(io::ErrorKind::ConnectionRefused.into()));
        let error = client.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        dial.set_unsent();
        assert!(!dial.take_request(), "it was answered");
    }

    #[test]
    fn one_connection_is_made_at_a_time() {
        let wakeup = Wakeup::new().unwrap();
        let wake: Notify = {
            let wakeup = wakeup.clone();
            Arc::new(move || wakeup.wake())
        };
        let mut dialing = Dialing::default();
        assert!(dialing.poll().is_none());
        dialing.begin(server(), Arc::clone(&wake));
        dialing.begin(server(), wake);
        let outcome = loop {
            if let Some(outcome) = dialing.poll() {
                break outcome;
            }
            std::thread::yield_now();
        };
        assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(dialing.poll().is_none());
    }
}
