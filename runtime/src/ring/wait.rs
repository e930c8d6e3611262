//! Submitting operations to the kernel and waiting for them.

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
    /// Submits all pending operations to the kernel, without waiting. It takes one system call per
    /// batch, and none if there is no new operation and a [gathering](Self::gathering) ring has no
    /// deferred completions. Operations that the kernel cannot accept now are submitted by the next
    /// call.
    ///
    /// # Errors
    /// An error of `io_uring_enter`, except for transient ones (`EAGAIN`, `ENOMEM`, `EBUSY`,
    /// `EINTR`).
    pub fn flush(&mut self) -> io::Result<()> {
        if self.unsubmitted || (self.gathering && self.uring.submission().taskrun()) {
            self.enter(|uring| uring.submit())?;
        }
        Ok(())
    }

    /// Executes a system call that submits operations. Returns whether it succeeded; after a
    /// transient error, it must be repeated.
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
                // The kernel may have accepted only some of them. A kernel thread accepts all of
                // them later.
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

    /// Pauses after a transient error, unless there are completions to reap: the kernel may be
    /// waiting for that.
    fn pause(&mut self, most: Option<Duration>) {
        let pause = self.backoff.pause_for_ever();
        if !self.has_done() {
            std::thread::sleep(most.map_or(pause, |most| pause.min(most)));
        }
    }

    /// Submits all pending operations and waits until one has completed, or the timeout expires.
    /// May return earlier after a transient error of the kernel.
    ///
    /// # Errors
    /// An error of `io_uring_enter`, except for transient ones.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        if self.is_polled() {
            return self.wait_polling(timeout);
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

    /// Submits all pending operations and waits until `count` operations have completed, or `time`
    /// expires. In a [gathering](Self::gathering) ring, earlier completions do not wake the thread.
    ///
    /// # Errors
    /// An error of `io_uring_enter`.
    pub fn wait_for(&mut self, count: usize, time: Duration) -> io::Result<()> {
        let timespec = Timespec::from(time);
        let args = SubmitArgs::new().timespec(&timespec);
        let entered = self.enter(|uring| {
            match uring.submitter().submit_with_args(count, &args) {
                // The operations were submitted before the timeout started.
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

    /// The kernel would poll the device without a limit and without a timeout.
    #[cold]
    fn wait_polling(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let begin = Instant::now();
        while !self.poll()? && timeout.is_none_or(|time| begin.elapsed() < time) {
            std::hint::spin_loop();
        }
        Ok(())
    }

    /// Whether there is a completion to reap. Makes no system call.
    pub fn has_done(&mut self) -> bool {
        !self.uring.completion().is_empty()
    }

    /// Whether there is a completion to reap, including those that the kernel produces only when it
    /// is entered (a poll, a read that had to wait). Makes a system call only if there are such
    /// completions, or the ring is a [polled](Self::polled) one with operations in flight.
    ///
    /// # Errors
    /// An error of `io_uring_enter`.
    pub fn poll(&mut self) -> io::Result<bool> {
        let finishes_when_entered = |uring: &mut Self| {
            uring.uring.submission().taskrun() || (uring.in_flight > 0 && uring.is_polled())
        };
        if !self.has_done() && finishes_when_entered(self) {
            self.enter(|uring| uring.submit())?;
        }
        Ok(self.has_done())
    }
}

/// Repeats a call that a signal interrupted.
fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}
