//! Handing operations to the kernel, and waiting for them.

use super::Uring;
use crate::buf::IoBuf;
use io_uring::IoUring;
use io_uring::types::{SubmitArgs, Timespec};
use std::io;
use std::time::{Duration, Instant};

const EAGAIN: i32 = 11;
const ENOMEM: i32 = 12;
const EBUSY: i32 = 16;
const ETIME: i32 = 62;

impl<B: IoBuf> Uring<B> {
    /// Hands everything submitted so far to the kernel, without waiting. One system call a batch;
    /// none if there is nothing new, and nothing that a [gathering](Self::gathering) ring has left
    /// to be finished. What the kernel cannot take just now is handed over by the next call.
    ///
    /// # Errors
    /// What `io_uring_enter` says, unless that is transient (`EAGAIN`, `ENOMEM`, `EBUSY`, `EINTR`).
    pub fn flush(&mut self) -> io::Result<()> {
        if self.unsubmitted || (self.gathering && self.uring.submission().taskrun()) {
            self.enter(|uring| uring.submit())?;
        }
        Ok(())
    }

    /// Makes a system call that hands over what was submitted. Whether it was made; what has a transient
    /// error is to be made again.
    fn enter(&mut self, call: impl Fn(&IoUring) -> io::Result<usize>) -> io::Result<bool> {
        let called = retry(|| {
            #[cfg(test)]
            if let Some(errno) = self.failures.pop() {
                return Err(io::Error::from_raw_os_error(errno));
            }
            call(&self.uring)
        });
        match called {
            Ok(_) => {
                self.backoff.reset();
                // The kernel may have taken a part of it. A thread of its own takes all by itself.
                let by_itself = self.uring.params().is_setup_sqpoll();
                self.unsubmitted = !by_itself && !self.uring.submission().is_empty();
                Ok(true)
            }
            Err(error) if matches!(error.raw_os_error(), Some(EAGAIN | ENOMEM | EBUSY)) => {
                self.unsubmitted = true;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Lets a moment pass after a transient error, unless there is something to reap: that may be what the
    /// kernel waits for.
    fn pause(&mut self, most: Option<Duration>) {
        let pause = self.backoff.pause_for_ever();
        if !self.has_done() {
            std::thread::sleep(most.map_or(pause, |most| pause.min(most)));
        }
    }

    /// Hands everything to the kernel and waits until an operation has finished, or the time is
    /// over. May end before: after a transient error of the kernel, to be called again.
    ///
    /// # Errors
    /// What `io_uring_enter` says, unless that is transient.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        if self.is_polled() {
            return self.wait_looking(timeout);
        }
        match timeout {
            None => {
                if !self.enter(|uring| uring.submit_and_wait(1))? {
                    self.pause(None);
                }
                Ok(())
            }
            Some(time) => self.wait_for(1, time),
        }
    }

    /// Hands everything to the kernel and waits until so many operations have finished, or the time
    /// is over, however many have then. A [gathering](Self::gathering) ring sleeps through those
    /// that finish first.
    ///
    /// # Errors
    /// What `io_uring_enter` says.
    pub fn wait_for(&mut self, count: usize, time: Duration) -> io::Result<()> {
        let timespec = Timespec::from(time);
        let args = SubmitArgs::new().timespec(&timespec);
        let entered = self.enter(|uring| {
            match uring.submitter().submit_with_args(count, &args) {
                // All was taken before the time began.
                Err(e) if e.raw_os_error() == Some(ETIME) => Ok(0),
                other => other,
            }
        })?;
        if !entered {
            self.pause(Some(time));
        }
        Ok(())
    }

    fn is_polled(&self) -> bool {
        self.uring.params().is_setup_iopoll()
    }

    /// The kernel would look at the device for as long as it takes, and at no clock.
    #[cold]
    fn wait_looking(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let begin = Instant::now();
        while !self.look()? && timeout.is_none_or(|time| begin.elapsed() < time) {
            std::hint::spin_loop();
        }
        Ok(())
    }

    /// Whether a finished operation is waiting to be reaped. No system call.
    pub fn has_done(&mut self) -> bool {
        !self.uring.completion().is_empty()
    }

    /// Whether a finished operation is waiting to be reaped, also one that the kernel finishes only
    /// when it is entered (a poll, a read that had to wait). A system call only if there is one, or
    /// the ring is a [polled](Self::polled) one with operations under way.
    ///
    /// # Errors
    /// What `io_uring_enter` says.
    pub fn look(&mut self) -> io::Result<bool> {
        let finishes_when_entered = |uring: &mut Self| {
            uring.uring.submission().taskrun() || (uring.in_flight > 0 && uring.is_polled())
        };
        if !self.has_done() && finishes_when_entered(self) {
            self.enter(|uring| uring.submit())?;
        }
        Ok(self.has_done())
    }
}

/// Repeats what a signal interrupted.
fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}
