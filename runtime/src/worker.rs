//! A thread that serves until it is stopped.
#![forbid(unsafe_code)]

use crate::gate::Gate;
use crate::task::{Task, TaskError};
use std::io::{self, PipeWriter};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::task::Poll;

/// Called by a worker, on its own thread, when there is something to poll.
pub type Notify = Arc<dyn Fn() + Send + Sync>;

/// Running worker, which may end with a fault `E`. Dropping it stops it and waits until its thread
/// has released everything. A caller that must not block calls [`stop`](Self::stop) first.
#[derive(Debug)]
pub struct Worker<E> {
    /// `None` only while this is dropped.
    task: Option<Task<Option<E>>>,
    stop: StopFlag,
    gate: Gate,
    /// Closing it wakes the worker, which then checks `stop`.
    wake: Option<PipeWriter>,
    started: Receiver<io::Result<()>>,
    serves: bool,
    /// The fault that stands for a panic.
    panicked: Option<E>,
    /// Whether the outcome was received: the thread has released everything.
    over: bool,
}

/// Whether a worker was stopped. The worker must check it in every round, because a busy worker
/// never waits.
#[derive(Clone, Debug, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// Returns whether the worker must stop.
    #[must_use]
    #[inline]
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl<E: Send + 'static> Worker<E> {
    /// Starts a thread of that name. It calls `start`, which creates what the thread uses (an
    /// io_uring belongs to the thread that uses it) and watches a descriptor that is readable when
    /// the worker is stopped. If `start` succeeds, the worker is [ready](Self::ready), and the
    /// thread calls `serve`, which returns when the [`StopFlag`] is set, or with a fault. A panic
    /// in one of them is the fault `panicked`.
    ///
    /// The thread calls `notify` when the worker is ready or has failed to start, and when it has
    /// ended, for whatever reason.
    ///
    /// # Errors
    /// The system's error if it has no thread or descriptor.
    pub fn spawn<S>(
        name: impl Into<String>,
        notify: Notify,
        panicked: E,
        start: impl FnOnce(OwnedFd) -> io::Result<S> + Send + 'static,
        serve: impl FnOnce(S, &StopFlag) -> Result<(), E> + Send + 'static,
    ) -> io::Result<Self> {
        Self::spawn_held(name, notify, panicked, start, serve, Gate::opened())
    }

    /// As [`spawn`](Self::spawn), but the thread calls `serve` when `gate` is open. A worker that is
    /// stopped before drops what `start` returned and ends without a fault.
    ///
    /// # Errors
    /// The system's error if it has no thread or descriptor.
    pub fn spawn_held<S>(
        name: impl Into<String>,
        notify: Notify,
        panicked: E,
        start: impl FnOnce(OwnedFd) -> io::Result<S> + Send + 'static,
        serve: impl FnOnce(S, &StopFlag) -> Result<(), E> + Send + 'static,
        gate: Gate,
    ) -> io::Result<Self> {
        let (woken, wake) = io::pipe()?;
        let stop = StopFlag::default();
        let (stopped, ended) = (stop.clone(), Arc::clone(&notify));
        let held = gate.clone();
        let (send, started) = sync_channel(1);
        let work = move || {
            let (state, outcome) = match start(woken.into()) {
                Ok(state) => (Some(state), Ok(())),
                Err(error) => (None, Err(error)),
            };
            let _ = send.send(outcome);
            notify();
            let state = state?;
            if !held.wait(|| stopped.is_set()) {
                return None;
            }
            serve(state, &stopped).err()
        };
        let task = Some(Task::spawn(name, work, move || ended())?);
        let (wake, panicked) = (Some(wake), Some(panicked));
        Ok(Self { task, stop, gate, wake, started, serves: false, panicked, over: false })
    }

    /// Waits until the worker is [ready](Self::ready).
    ///
    /// # Errors
    /// The error of its start.
    pub fn wait_ready(&mut self) -> io::Result<()> {
        if !self.serves {
            self.started.recv().unwrap_or_else(|_| Err(ended_early()))?;
            self.serves = true;
        }
        Ok(())
    }

    /// Returns whether the worker has started: it serves, unless a [`Gate`] holds it back.
    ///
    /// # Errors
    /// The error of its start.
    pub fn ready(&mut self) -> Poll<io::Result<()>> {
        if self.serves {
            return Poll::Ready(Ok(()));
        }
        match self.started.try_recv() {
            Ok(outcome) => {
                self.serves = outcome.is_ok();
                Poll::Ready(outcome)
            }
            Err(TryRecvError::Empty) => Poll::Pending,
            Err(TryRecvError::Disconnected) => Poll::Ready(Err(ended_early())),
        }
    }

    /// Returns the fault with which the worker ended on its own, if it did. A fault is reported
    /// once.
    #[must_use]
    pub fn fault(&mut self) -> Option<E> {
        match self.task.as_mut()?.poll() {
            Poll::Pending => None,
            Poll::Ready(outcome) => {
                self.over = true;
                outcome.unwrap_or_else(|_: TaskError| self.panicked.take())
            }
        }
    }

    /// Stops the worker. Called again until it is ready: the thread then holds no resources, and
    /// dropping this does not block. A fault that was not polled is lost.
    pub fn stop(&mut self) -> Poll<()> {
        self.request_stop();
        self.over |=
            self.task.as_mut().is_none_or(|task| task.poll().is_ready() || task.is_finished());
        if self.over { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl<E> Worker<E> {
    fn request_stop(&mut self) {
        self.stop.0.store(true, Ordering::Release);
        drop(self.wake.take());
        self.gate.wake();
    }
}

impl<E> Drop for Worker<E> {
    fn drop(&mut self) {
        self.request_stop();
        if let Some(task) = self.task.take() {
            task.join();
        }
    }
}

fn ended_early() -> io::Error {
    io::Error::other("the worker thread ended before it was ready")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wait::{WaitPoint, WatchRing};
    use std::sync::atomic::AtomicU32;
    use std::sync::mpsc::channel;

    #[derive(Debug, PartialEq, Eq)]
    enum Fault {
        Serving,
        Panicked,
    }

    fn start(woken: OwnedFd) -> io::Result<WatchRing> {
        let mut ring = WatchRing::new()?;
        ring.watch(woken)?;
        Ok(ring)
    }

    fn serve(mut ring: WatchRing, stop: &StopFlag) -> Result<(), Fault> {
        while !stop.is_set() {
            ring.wait(None).map_err(|_| Fault::Serving)?;
            ring.reap();
        }
        Ok(())
    }

    /// Returns a callback, and the number of its calls.
    fn counted() -> (Notify, Arc<AtomicU32>) {
        let calls = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&calls);
        let notify = move || {
            count.fetch_add(1, Ordering::Relaxed);
        };
        (Arc::new(notify), calls)
    }

    /// Returns the fault after this number of notifications.
    fn ended(worker: &mut Worker<Fault>, calls: &AtomicU32, wanted: u32) -> Option<Fault> {
        while calls.load(Ordering::Relaxed) < wanted {
            std::thread::yield_now();
        }
        worker.fault()
    }

    #[test]
    fn worker_that_cannot_start_reports_the_error() {
        let (notify, calls) = counted();
        let held = Arc::new(());
        let weak = Arc::downgrade(&held);
        let start = move |_| -> io::Result<()> {
            let _held = held;
            Err(io::ErrorKind::OutOfMemory.into())
        };
        let serve = |(), _: &StopFlag| Err(Fault::Serving);
        let mut worker = Worker::spawn("test", notify, Fault::Panicked, start, serve).unwrap();
        let error = worker.wait_ready().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::OutOfMemory);
        assert_eq!(ended(&mut worker, &calls, 2), None, "not a fault of the queue");
        assert!(weak.upgrade().is_none());
        assert_eq!(worker.stop(), Poll::Ready(()));
    }

    #[test]
    fn panic_while_serving_is_a_fault_and_releases_everything() {
        let (notify, calls) = counted();
        let held = Arc::new(());
        let weak = Arc::downgrade(&held);
        let serve = move |_, _: &StopFlag| {
            let _held = held;
            panic!("a test");
        };
        let mut worker = Worker::spawn("test", notify, Fault::Panicked, start, serve).unwrap();
        worker.wait_ready().unwrap();
        assert_eq!(ended(&mut worker, &calls, 2), Some(Fault::Panicked));
        assert!(weak.upgrade().is_none());
        assert_eq!(worker.fault(), None, "reported once");
        assert_eq!(worker.stop(), Poll::Ready(()));
    }

    #[test]
    fn panic_at_the_start_is_an_error_and_a_fault() {
        let (notify, calls) = counted();
        let start = |_| -> io::Result<()> { panic!("a test") };
        let serve = |(), _: &StopFlag| Ok(());
        let mut worker = Worker::spawn("test", notify, Fault::Panicked, start, serve).unwrap();
        assert!(worker.wait_ready().is_err());
        assert_eq!(ended(&mut worker, &calls, 1), Some(Fault::Panicked));
    }

    #[test]
    fn fault_is_reported_once() {
        let (notify, calls) = counted();
        let serve = |_, _: &StopFlag| Err(Fault::Serving);
        let mut worker = Worker::spawn("test", notify, Fault::Panicked, start, serve).unwrap();
        worker.wait_ready().unwrap();
        assert_eq!(ended(&mut worker, &calls, 2), Some(Fault::Serving));
        assert_eq!(worker.fault(), None);
    }

    #[test]
    fn worker_stops_while_it_waits() {
        let (notify, notified) = channel();
        let notify = Arc::new(move || notify.send(()).unwrap_or(()));
        let mut worker = Worker::spawn("test", notify, Fault::Panicked, start, serve).unwrap();
        notified.recv().unwrap();
        assert!(matches!(worker.ready(), Poll::Ready(Ok(()))));
        assert_eq!(worker.fault(), None);
        let mut stopped = worker.stop();
        if stopped.is_pending() {
            notified.recv().unwrap();
            stopped = worker.stop();
        }
        assert_eq!((stopped, worker.fault()), (Poll::Ready(()), None));
    }

    #[test]
    fn dropped_worker_has_released_everything() {
        let (notify, calls) = counted();
        let held = Arc::new(());
        let weak = Arc::downgrade(&held);
        let serve = move |ring, stop: &StopFlag| {
            let _held = held;
            serve(ring, stop)
        };
        let worker = Worker::spawn("test", notify, Fault::Panicked, start, serve).unwrap();
        assert!(weak.upgrade().is_some());
        drop(worker);
        assert!(weak.upgrade().is_none());
        assert_eq!(calls.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn held_worker_is_ready_but_serves_only_when_its_gate_is_open() {
        let (gate, (served, serves)) = (Gate::closed(), channel());
        let spawn = |served: std::sync::mpsc::Sender<()>| {
            let serve = move |ring, stop: &StopFlag| {
                served.send(()).unwrap();
                serve(ring, stop)
            };
            let notify = Arc::new(|| ());
            Worker::spawn_held("test", notify, Fault::Panicked, start, serve, gate.clone()).unwrap()
        };
        let mut workers = [spawn(served.clone()), spawn(served)];
        for worker in &mut workers {
            worker.wait_ready().unwrap();
        }
        let timeout = std::time::Duration::from_millis(20);
        assert!(serves.recv_timeout(timeout).is_err(), "nothing is served");
        gate.open();
        serves.recv().unwrap();
        serves.recv().unwrap();
        assert!(workers.iter_mut().all(|worker| worker.fault().is_none()));
    }

    #[test]
    fn held_worker_that_is_stopped_releases_everything_without_serving() {
        let (notify, calls) = counted();
        let held = Arc::new(());
        let weak = Arc::downgrade(&held);
        let start = move |_| Ok(held);
        let serve = |_, _: &StopFlag| Err(Fault::Serving);
        let gate = Gate::closed();
        let mut worker =
            Worker::spawn_held("test", notify, Fault::Panicked, start, serve, gate).unwrap();
        worker.wait_ready().unwrap();
        let _ = worker.stop();
        assert_eq!(ended(&mut worker, &calls, 2), None);
        assert!(weak.upgrade().is_none());
        drop(worker);
    }
}
