//! Workers of a session's queues, on an open link.
#![forbid(unsafe_code)]

use super::link::{Link, LinkDescription, WorkerSetup, not_started};
use crate::settings::RuntimeSettings;
use crate::worker::{Publish, Worker};
use alloc::boxed::Box;
use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::task::Poll;
use pvio_event_channel::BackendPlatform;
use pvio_netback::queue::{Queue, Waker};
use pvio_netback::session::{QueueServer, SessionConfig};
use pvio_netback::stats::Stats;
use pvio_recordfile::CounterFile;
use pvio_ring::shm::SharedMemory;
use pvio_runtime::{EventFd, Gate, PrivateBuf};
use pvio_xenbus::driver::Fault;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Open link of a vif, which its sessions use one after the other. It is closed when the last clone
/// is dropped.
#[derive(Clone)]
pub struct OpenLink(Arc<Mutex<Link>>);

impl OpenLink {
    pub(super) fn new(link: Link) -> Self {
        Self(Arc::new(Mutex::new(link)))
    }

    /// Returns the link to what another process opened. Opens nothing, and needs no capability.
    ///
    /// # Errors
    /// A [`Fault`] if the descriptors are not those of the description.
    pub fn from_descriptors(
        description: &LinkDescription,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Self, Fault> {
        Ok(Self::new(Link::from_opened(description, descriptors)?))
    }

    /// Returns what another process needs to use this link: a description, and the descriptors in
    /// their order. `None` if it can be used in this process only. Called again for each further
    /// process. This process must not use the link at the same time.
    ///
    /// # Errors
    /// A [`Fault`] if no descriptor is available.
    pub fn hand_over(&self) -> Result<Option<(LinkDescription, Vec<OwnedFd>)>, Fault> {
        self.lock().hand_over()
    }

    /// Resets the link after the session of another process has ended, which may not have done so
    /// itself: a tap has no carrier then.
    pub fn reset(&self) {
        self.lock().stopped();
    }

    /// Locks the link. Only the thread that drives the device does that, so nothing waits.
    pub(super) fn lock(&self) -> MutexGuard<'_, Link> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for OpenLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenLink").finish_non_exhaustive()
    }
}

/// Serves the queues of one session on an open link, with a worker thread for each. It opens nothing:
/// the part of a vif that may run in another process than the one that opened the link.
pub struct LinkQueues {
    link: OpenLink,
    settings: Arc<RuntimeSettings>,
    wake: Waker,
    /// Event descriptors by which the queues of the session wake each other, if it has a control
    /// ring.
    wakeups: Vec<EventFd>,
    gate: Gate,
    counters: Option<CounterFile>,
}

impl LinkQueues {
    /// Returns a server of queues without a session. `wake` may be called by any thread, when a
    /// worker is ready or has ended on its own. The session must be polled then.
    #[must_use]
    pub fn new(link: OpenLink, settings: Arc<RuntimeSettings>, wake: Waker) -> Self {
        Self { link, settings, wake, wakeups: Vec::new(), gate: Gate::opened(), counters: None }
    }

    /// Holds the workers back, once they have created their ports, until `gate` is open.
    #[must_use]
    pub fn behind(self, gate: Gate) -> Self {
        Self { gate, ..self }
    }

    /// Publishes the counters of each queue for another process, whenever its worker waits.
    #[must_use]
    pub fn publishing(self, counters: CounterFile) -> Self {
        Self { counters: Some(counters), ..self }
    }
}

impl fmt::Debug for LinkQueues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (link, settings) = (&self.link, &self.settings);
        let all = &mut f.debug_struct("LinkQueues");
        all.field("link", link).field("settings", settings).finish_non_exhaustive()
    }
}

impl<P, R> QueueServer<P, R> for LinkQueues
where
    P: BackendPlatform + Send + 'static,
    P::Channel: AsFd,
    R: SharedMemory + Clone + Send + Sync + 'static,
{
    type Buf = PrivateBuf;
    type Running = Worker;

    fn wakers(&mut self, queues: usize) -> Result<Vec<Waker>, Fault> {
        self.wakeups.clear();
        let mut wakers = Vec::with_capacity(queues);
        for _ in 0..queues {
            let failed = |e: io::Error| {
                Fault::new("worker", format!("a queue's eventfd cannot be created: {e}"))
            };
            let wakeup = EventFd::new().map_err(failed)?;
            let other = wakeup.try_clone().map_err(failed)?;
            self.wakeups.push(wakeup);
            wakers.push(Arc::new(move || other.notify()) as Waker);
        }
        Ok(wakers)
    }

    fn begin(&mut self, session: &SessionConfig) -> Result<(), Fault> {
        self.link.lock().begin(session)
    }

    fn start(
        &mut self,
        index: usize,
        name: &str,
        queue: Queue<P, PrivateBuf, R>,
    ) -> Result<Worker, Fault> {
        let wakeup = self.wakeups.get(index).map(EventFd::try_clone).transpose();
        let publish = self.counters.clone().map(|counters| -> Publish {
            Box::new(move |stats: &Stats| counters.publish(index, stats.words()))
        });
        let setup = WorkerSetup {
            index,
            name: name.into(),
            queue,
            wakeup: wakeup.map_err(not_started)?,
            settings: Arc::clone(&self.settings),
            wake: Arc::clone(&self.wake),
            gate: self.gate.clone(),
            publish,
        };
        self.link.lock().start(setup)
    }

    fn ready(&mut self, running: &mut Worker) -> Result<Poll<()>, Fault> {
        match running.ready() {
            Poll::Pending => Ok(Poll::Pending),
            Poll::Ready(Ok(())) => Ok(Poll::Ready(())),
            Poll::Ready(Err(error)) => Err(not_started(error)),
        }
    }

    fn started(&mut self) {
        self.link.lock().started();
    }

    fn stopped(&mut self) {
        self.wakeups.clear();
        self.link.lock().stopped();
    }

    fn fault(&mut self, running: &mut Worker) -> Option<Fault> {
        running.fault().map(|error| Fault::of(error.code(), &error))
    }

    fn stop(&mut self, running: &mut Worker) -> Poll<()> {
        running.stop()
    }
}
