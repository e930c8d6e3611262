//! Wait points: the only place where a worker sleeps.
//!
//! An engine or a port that uses an io_uring implements [`WaitPoint`] with it, and [`Watches`] keeps
//! the descriptors. One without an io_uring contains a [`WatchRing`]. A wrapper of a wait point
//! implements [`Wrapper`], and is a wait point thereby.
#![forbid(unsafe_code)]

use crate::buf::{IoBuf, PrivateBuf};
use crate::ring::{DisabledUring, FileId, Operations, Uring};
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// Largest number of descriptors that a wait point can watch.
pub const MAX_WATCHES: usize = 8;

/// Identifies a watched descriptor of one wait point.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Watch(usize);

/// Engine or port at which a thread can wait for its own work and for watched descriptors.
pub trait WaitPoint {
    /// Adds a descriptor that ends the wait when it becomes readable.
    ///
    /// # Errors
    /// More than [`MAX_WATCHES`] descriptors.
    fn watch(&mut self, file: OwnedFd) -> io::Result<Watch>;

    /// Returns whether a watched descriptor has become readable since the last call, as of the last
    /// time that completions were reaped. The watch is armed again then: the descriptor must be
    /// cleared before the next [`wait`](Self::wait). A watch that has fired does not end another
    /// wait until this was called.
    fn fired(&mut self, watch: Watch) -> bool;

    /// Submits pending operations and waits until there is work, a watched descriptor is readable, or
    /// the timeout expires. A caller with a deadline passes the time until then.
    ///
    /// # Errors
    /// An error of `io_uring_enter`.
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()>;
}

/// Wrapper (decorator) of an engine or port that waits where the inner one waits.
pub trait Wrapper {
    /// The wrapped engine or port, which may be a wrapper too.
    type Inner: WaitPoint + ?Sized;

    /// Returns the wrapped engine or port.
    fn inner(&mut self) -> &mut Self::Inner;
}

impl<T: Wrapper> WaitPoint for T {
    fn watch(&mut self, file: OwnedFd) -> io::Result<Watch> {
        self.inner().watch(file)
    }

    fn fired(&mut self, watch: Watch) -> bool {
        self.inner().fired(watch)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.inner().wait(timeout)
    }
}

impl<E: WaitPoint + ?Sized> Wrapper for Box<E> {
    type Inner = E;

    fn inner(&mut self) -> &mut E {
        self
    }
}

/// Descriptors that are watched with an io_uring.
#[derive(Debug)]
pub struct Watches {
    /// Token of the first descriptor; the others have the following numbers.
    first: u64,
    all: Vec<Watched>,
}

#[derive(Debug)]
struct Watched {
    file: FileId,
    armed: bool,
    fired: bool,
}

impl Watches {
    /// Creates an empty list. Polls of its descriptors have the tokens from `first` on.
    #[must_use]
    pub fn new(first: u64) -> Self {
        Self { first, all: Vec::with_capacity(MAX_WATCHES) }
    }

    /// Adds a descriptor.
    ///
    /// # Errors
    /// More than [`MAX_WATCHES`] descriptors.
    pub fn add<B: IoBuf>(&mut self, uring: &mut Uring<B>, file: OwnedFd) -> io::Result<Watch> {
        if self.all.len() >= MAX_WATCHES {
            return Err(io::Error::other(format!(
                "a wait point watches at most {MAX_WATCHES} descriptors"
            )));
        }
        let file = uring.add_file(file);
        self.all.push(Watched { file, armed: false, fired: false });
        Ok(Watch(self.all.len() - 1))
    }

    /// See [`WaitPoint::fired`].
    pub fn fired(&mut self, watch: Watch) -> bool {
        self.all.get_mut(watch.0).is_some_and(|watched| std::mem::take(&mut watched.fired))
    }

    /// Processes the completion of the poll with this token: its descriptor is readable.
    pub fn complete(&mut self, token: u64) {
        let index = token.checked_sub(self.first).and_then(|index| usize::try_from(index).ok());
        if let Some(watched) = index.and_then(|index| self.all.get_mut(index)) {
            (watched.armed, watched.fired) = (false, true);
        }
    }

    /// Queues a poll for each descriptor that is not armed and has not fired. The io_uring must have
    /// [`MAX_WATCHES`] slots for them.
    pub fn arm<B: IoBuf>(&mut self, uring: &mut Uring<B>) {
        for (token, watched) in (self.first..).zip(&mut self.all) {
            if !watched.armed && !watched.fired {
                watched.armed = uring.poll_readable(watched.file, token).is_ok();
            }
        }
    }
}

/// An io_uring that only waits, for engines and ports whose work is done elsewhere. It must be used
/// by the thread that created it.
///
/// ```
/// use pvio_runtime::{EventFd, WaitPoint, WatchRing};
///
/// let event = EventFd::new()?;
/// let mut ring = WatchRing::new()?;
/// let watch = ring.watch(event.to_fd()?)?;
/// event.notify();
/// ring.wait(None)?;
/// ring.reap();
/// assert!(ring.fired(watch));
/// event.clear();
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct WatchRing {
    uring: Uring<PrivateBuf>,
    watches: Watches,
}

impl WatchRing {
    /// Creates an io_uring with a slot for each watch.
    ///
    /// # Errors
    /// An error of `io_uring_setup`.
    pub fn new() -> io::Result<Self> {
        let ring = DisabledUring::new(MAX_WATCHES as u32)?;
        Ok(Self { uring: ring.enable(Operations::POLL)?, watches: Watches::new(0) })
    }

    /// Processes completed polls.
    pub fn reap(&mut self) {
        let Self { uring, watches } = self;
        uring.reap(|done| watches.complete(done.token));
    }

    /// Submits polls of the descriptors that are not armed. Completions stay for the next
    /// [`reap`](Self::reap): one that was processed here would not end the next wait.
    ///
    /// # Errors
    /// An error of `io_uring_enter`.
    pub fn arm(&mut self) -> io::Result<()> {
        self.watches.arm(&mut self.uring);
        self.uring.flush()
    }

    /// Returns whether a poll has completed. Makes a system call only if the kernel has deferred
    /// completions.
    ///
    /// # Errors
    /// An error of `io_uring_enter`.
    pub fn has_work(&mut self) -> io::Result<bool> {
        self.uring.poll()
    }
}

impl WaitPoint for WatchRing {
    fn watch(&mut self, file: OwnedFd) -> io::Result<Watch> {
        self.watches.add(&mut self.uring, file)
    }

    fn fired(&mut self, watch: Watch) -> bool {
        self.watches.fired(watch)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.watches.arm(&mut self.uring);
        if self.uring.has_done() {
            return Ok(());
        }
        self.uring.wait(timeout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::EventFd;

    struct Outer(WatchRing);

    impl Wrapper for Outer {
        type Inner = WatchRing;

        fn inner(&mut self) -> &mut WatchRing {
            &mut self.0
        }
    }

    #[test]
    fn arming_leaves_completions_for_the_next_wait() {
        let event = EventFd::new().unwrap();
        let mut ring = WatchRing::new().unwrap();
        let watch = ring.watch(event.to_fd().unwrap()).unwrap();
        ring.arm().unwrap();
        ring.reap();
        assert!(!ring.fired(watch));
        // It arrives after the last check.
        event.notify();
        ring.arm().unwrap();
        assert!(!ring.fired(watch), "nothing reads it before the wait");
        ring.wait(Some(Duration::from_secs(60))).unwrap();
        ring.reap();
        assert!(ring.fired(watch));
    }

    #[test]
    fn watch_that_fired_is_armed_again_after_it_was_read() {
        let event = EventFd::new().unwrap();
        let mut ring = WatchRing::new().unwrap();
        let watch = ring.watch(event.to_fd().unwrap()).unwrap();
        assert!(!ring.fired(watch));
        for _ in 0..3 {
            event.notify();
            ring.wait(None).unwrap();
            ring.reap();
            // Not armed, so the readable descriptor does not end the wait.
            ring.wait(Some(Duration::from_millis(1))).unwrap();
            assert!(ring.fired(watch) && !ring.fired(watch));
            event.clear();
        }
        ring.wait(Some(Duration::from_millis(1))).unwrap();
        ring.reap();
        assert!(!ring.fired(watch));
    }

    #[test]
    fn wrapper_waits_where_the_inner_one_does() {
        let event = EventFd::new().unwrap();
        let mut outer: Box<dyn WaitPoint> = Box::new(Box::new(Outer(WatchRing::new().unwrap())));
        let watch = outer.watch(event.to_fd().unwrap()).unwrap();
        outer.wait(Some(Duration::from_millis(5))).unwrap();
        event.notify();
        outer.wait(None).unwrap();
        assert!(!outer.fired(watch), "completions are not reaped");
    }

    #[test]
    fn too_many_watches_are_an_error() {
        let event = EventFd::new().unwrap();
        let mut ring = WatchRing::new().unwrap();
        for _ in 0..MAX_WATCHES {
            ring.watch(event.to_fd().unwrap()).unwrap();
        }
        assert!(ring.watch(event.to_fd().unwrap()).is_err());
    }
}
