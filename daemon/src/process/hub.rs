//! The events of all processes, as one descriptor for the supervisor's only wait.

use pvio_runtime::Notify;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Maximum number of events that are taken in one call.
const MAX_EVENTS: usize = 64;

/// Watches descriptors and calls a function for each that becomes readable.
#[derive(Clone)]
pub struct Hub(Arc<Inner>);

struct Inner {
    epoll: OwnedFd,
    next: AtomicU64,
    watches: Mutex<BTreeMap<u64, Notify>>,
}

/// A watched descriptor. Dropping this ends the watch.
pub struct HubWatch {
    hub: Hub,
    token: u64,
    descriptor: OwnedFd,
}

impl Hub {
    /// Creates a hub without watches.
    ///
    /// # Errors
    /// The system is out of file descriptors.
    pub fn new() -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        Ok(Self(Arc::new(Inner { epoll, next: AtomicU64::new(0), watches: Mutex::default() })))
    }

    /// Calls `wake` whenever data arrives at the descriptor, or its other end is closed. All that is
    /// readable must be read then: the function is called once for what arrived.
    ///
    /// # Errors
    /// The system's error.
    pub fn watch(&self, descriptor: BorrowedFd<'_>, wake: Notify) -> io::Result<HubWatch> {
        // A watch ends when the last descriptor of the file is closed; its own makes that certain.
        let descriptor = descriptor.try_clone_to_owned()?;
        let token = self.0.next.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(token, wake);
        let watch = HubWatch { hub: self.clone(), token, descriptor };
        let flags = EventFlags::IN | EventFlags::ET;
        epoll::add(&self.0.epoll, &watch.descriptor, EventData::new_u64(token), flags)?;
        Ok(watch)
    }

    /// Calls the functions of the descriptors that have become readable. Does not wait.
    ///
    /// # Errors
    /// The system's error.
    pub fn dispatch(&self) -> io::Result<()> {
        let none = Event { flags: EventFlags::empty(), data: EventData::new_u64(0) };
        let mut events = [none; MAX_EVENTS];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let count = match epoll::wait(&self.0.epoll, &mut events, Some(&now)) {
            Ok(count) => count,
            Err(rustix::io::Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        for event in &events[..count] {
            let wake = self.lock().get(&{ event.data }.u64()).cloned();
            if let Some(wake) = wake {
                wake();
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Notify>> {
        self.0.watches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Hub {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.epoll.as_fd()
    }
}

impl Drop for HubWatch {
    fn drop(&mut self) {
        self.hub.lock().remove(&self.token);
        // Fails only if adding it failed.
        let _ = epoll::delete(&self.hub.0.epoll, &self.descriptor);
    }
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub").field("watches", &self.lock().len()).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for HubWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubWatch").field("token", &self.token).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::pipe;

    fn counting() -> (Arc<AtomicU64>, Notify) {
        let count = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&count);
        (
            count,
            Arc::new(move || {
                counted.fetch_add(1, Ordering::Relaxed);
            }),
        )
    }

    #[test]
    fn readable_descriptor_calls_its_own_function_once() {
        let hub = Hub::new().unwrap();
        let ((reader, writer), (quiet, _end)) = (pipe().unwrap(), pipe().unwrap());
        let ((one, wake_one), (other, wake_other)) = (counting(), counting());
        let _watch = hub.watch(reader.as_fd(), wake_one).unwrap();
        let _other = hub.watch(quiet.as_fd(), wake_other).unwrap();
        rustix::io::write(&writer, b"x").unwrap();
        hub.dispatch().unwrap();
        hub.dispatch().unwrap();
        assert_eq!((one.load(Ordering::Relaxed), other.load(Ordering::Relaxed)), (1, 0));
        rustix::io::write(&writer, b"y").unwrap();
        hub.dispatch().unwrap();
        assert_eq!(one.load(Ordering::Relaxed), 2, "new data calls it again");
    }

    #[test]
    fn dropped_watch_is_not_called_although_descriptor_is_open() {
        let hub = Hub::new().unwrap();
        let (reader, writer) = pipe().unwrap();
        let (count, wake) = counting();
        drop(hub.watch(reader.as_fd(), wake).unwrap());
        rustix::io::write(&writer, b"x").unwrap();
        hub.dispatch().unwrap();
        assert_eq!(count.load(Ordering::Relaxed), 0);
    }
}
