//! Blocking work on a separate thread, for a thread that must not block.
#![forbid(unsafe_code)]

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::task::Poll;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// Reason why a task has no outcome.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TaskError {
    /// The work panicked.
    #[error("the thread panicked")]
    Panicked,
    /// The deadline was reached. The thread may still run.
    #[error("the deadline was reached")]
    TimedOut,
}

/// Work on a separate thread. Its outcome can be polled, or waited for. The thread is not joined
/// when this is dropped: it ends when the work is done, and the outcome is dropped there.
///
/// ```
/// use pvio_runtime::Task;
/// use std::task::Poll;
/// use std::sync::mpsc::channel;
///
/// let (notify, notified) = channel();
/// let mut task = Task::spawn("sum", || 1 + 2, move || notify.send(()).unwrap_or(()))?;
/// notified.recv()?;
/// assert_eq!(task.poll(), Poll::Ready(Ok(3)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Task<T> {
    thread: JoinHandle<()>,
    outcome: Receiver<Result<T, TaskError>>,
    deadline: Option<Instant>,
}

impl<T: Send + 'static> Task<T> {
    /// Starts a thread of that name, which calls `work` and then, when the outcome can be polled,
    /// `notify`. Everything that `work` owns is dropped before, also after a panic.
    ///
    /// # Errors
    /// The system's error if it has no thread; `work` is dropped then.
    pub fn spawn(
        name: impl Into<String>,
        work: impl FnOnce() -> T + Send + 'static,
        notify: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let (send, outcome) = sync_channel(1);
        let thread = Builder::new().name(name.into()).spawn(move || {
            let outcome = catch_unwind(AssertUnwindSafe(work));
            let _ = send.send(outcome.map_err(|_| TaskError::Panicked));
            drop(send);
            notify();
        })?;
        Ok(Self { thread, outcome, deadline: None })
    }

    /// Gives the task up after this time from now.
    #[must_use]
    pub fn within(mut self, timeout: Duration) -> Self {
        self.deadline = Instant::now().checked_add(timeout);
        self
    }

    /// Changes the time at which the task is given up.
    pub fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = Some(deadline);
    }

    /// Returns the outcome once. After that, the task is pending until its deadline.
    pub fn poll(&mut self) -> Poll<Result<T, TaskError>> {
        match self.outcome.try_recv() {
            Ok(outcome) => Poll::Ready(outcome),
            Err(TryRecvError::Empty | TryRecvError::Disconnected) if !self.is_late() => {
                Poll::Pending
            }
            Err(_) => Poll::Ready(Err(TaskError::TimedOut)),
        }
    }

    /// Waits for the outcome.
    ///
    /// # Errors
    /// [`TaskError`].
    pub fn wait(&mut self) -> Result<T, TaskError> {
        let received = match self.deadline {
            Some(deadline) => {
                self.outcome.recv_timeout(deadline.saturating_duration_since(Instant::now()))
            }
            None => self.outcome.recv().map_err(RecvTimeoutError::from),
        };
        received.unwrap_or(Err(TaskError::TimedOut))
    }

    fn is_late(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }
}

impl<T> Task<T> {
    /// Returns whether the thread has ended, whatever became of its outcome.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for the end of the thread. The outcome is dropped, unless it was polled.
    pub fn join(self) {
        // A panic is part of the outcome.
        let _ = self.thread.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn panic_is_the_outcome_and_is_notified() {
        let (notify, notified) = channel();
        let work = || -> u32 { panic!("a test") };
        let mut task = Task::spawn("panics", work, move || notify.send(()).unwrap_or(())).unwrap();
        notified.recv().unwrap();
        assert_eq!(task.poll(), Poll::Ready(Err(TaskError::Panicked)));
        assert_eq!(task.poll(), Poll::Pending, "reported once");
    }

    #[test]
    fn task_is_given_up_at_its_deadline() {
        let (release, released) = channel::<()>();
        let mut task = Task::spawn("waits", move || released.recv().is_ok(), || ()).unwrap();
        assert_eq!(task.poll(), Poll::Pending);
        task = task.within(Duration::from_millis(5));
        assert_eq!(task.wait(), Err(TaskError::TimedOut));
        assert_eq!(task.poll(), Poll::Ready(Err(TaskError::TimedOut)));
        // Late, but not lost.
        release.send(()).unwrap();
        task.set_deadline(Instant::now() + Duration::from_secs(60));
        assert_eq!(task.wait(), Ok(true));
        task.join();
    }
}
