//! Opening and closing of a disk on separate threads, because both block for as long as storage or
//! a server does.

use super::Open;
use crate::image::ImageError;
use alloc::format;
use alloc::sync::{Arc, Weak};
use pvio_xenbus::driver::Fault;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::string::String;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

/// Default time to wait for an image that is in use elsewhere: as long as a migration takes from
/// the start of the new domain to the end of the old one.
pub const BUSY: Duration = Duration::from_secs(30);
/// Interval between attempts to open.
const AGAIN: Duration = Duration::from_millis(50);

/// Timeouts of the steps of opening. The time of a step begins when the previous step ends, so that
/// the error names the step that takes too long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadlines {
    /// For the I/O of an earlier process to end. The kernel's disk drivers time a command out after
    /// 30 s.
    pub fence: Duration,
    /// For an image that is in use.
    pub busy: Duration,
    /// For opening, in addition.
    pub opening: Duration,
}

impl Deadlines {
    /// Returns the timeouts of a disk, with this time to wait for an image that is in use.
    pub const fn of(busy: Duration) -> Self {
        Self { fence: Duration::from_secs(90), busy, opening: Duration::from_secs(60) }
    }
}

/// Wakes the thread that drives the device.
pub(super) type Wake = Arc<dyn Fn() + Send + Sync>;

/// Messages of a thread that opens a disk.
enum News {
    /// No I/O of an earlier process is in flight.
    Fenced,
    Busy(Fault),
    Over(Result<Open, Fault>),
}

/// A disk that is being opened. The thread ends soon after this is dropped.
pub(super) struct Pending {
    news: Receiver<News>,
    deadlines: Deadlines,
    by: Instant,
    /// The reason why the disk is not open, if its image is in use elsewhere.
    pub busy: Option<Fault>,
    _wanted: Arc<()>,
}

impl Pending {
    /// Starts a thread that waits for the fence and then calls `open`, repeatedly while that fails
    /// because the image is busy. `before`, the previously open disk, is closed first.
    pub fn begin<F>(
        name: &str,
        deadlines: Deadlines,
        before: Option<Open>,
        fence: impl FnOnce() -> Result<F, ImageError> + Send + 'static,
        open: impl Fn(&F) -> Result<Open, ImageError> + Send + 'static,
        wake: Wake,
    ) -> Result<Self, Fault> {
        let (tell, news) = sync_channel(3);
        let wanted = Arc::new(());
        let weak = Arc::downgrade(&wanted);
        let work = move || {
            drop(before);
            let work = || {
                let fence = fence().map_err(fault)?;
                let _ = tell.send(News::Fenced);
                let by = Instant::now() + deadlines.busy;
                patiently(|| open(&fence), by, &weak, &tell, &wake)
            };
            let outcome = catch_unwind(AssertUnwindSafe(work));
            let panicked =
                || Fault::new("image-panic", "opening the image failed: the thread panicked");
            let _ = tell.send(News::Over(outcome.unwrap_or_else(|_| Err(panicked()))));
            wake();
        };
        let spawned = Builder::new().name(format!("open-{name}")).spawn(work);
        let failed =
            |e| Fault::new("worker", format!("the thread that opens the disk cannot start: {e}"));
        spawned.map_err(failed)?;
        // The fence reports its own timeout.
        let by = Instant::now() + deadlines.fence + deadlines.opening;
        Ok(Self { news, deadlines, by, busy: None, _wanted: wanted })
    }

    /// Returns the outcome, if there is one.
    pub fn poll(&mut self) -> Option<Result<Open, Fault>> {
        loop {
            match self.news.try_recv() {
                Ok(news) => {
                    if let Some(outcome) = self.heard(news) {
                        return Some(outcome);
                    }
                }
                Err(TryRecvError::Empty) if Instant::now() < self.by => return None,
                Err(_) => return Some(Err(too_long())),
            }
        }
    }

    /// Waits for the outcome.
    pub fn wait(&mut self) -> Result<Open, Fault> {
        loop {
            match self.news.recv_timeout(self.by.saturating_duration_since(Instant::now())) {
                Ok(news) => {
                    if let Some(outcome) = self.heard(news) {
                        return outcome;
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    return Err(too_long());
                }
            }
        }
    }

    fn heard(&mut self, news: News) -> Option<Result<Open, Fault>> {
        match news {
            News::Fenced => {
                self.by = Instant::now() + self.deadlines.busy + self.deadlines.opening;
                None
            }
            News::Busy(fault) => {
                self.busy = Some(fault);
                None
            }
            News::Over(outcome) => Some(outcome),
        }
    }
}

fn fault(error: ImageError) -> Fault {
    Fault::of(error.code(), &error)
}

fn too_long() -> Fault {
    let fault = Fault::new("image-timeout", "opening the image failed: it takes too long");
    fault
        .with_remedy("check whether its storage responds, then detach the disk and attach it again")
}

fn patiently(
    open: impl Fn() -> Result<Open, ImageError>,
    by: Instant,
    wanted: &Weak<()>,
    tell: &SyncSender<News>,
    wake: &Wake,
) -> Result<Open, Fault> {
    let mut told = false;
    loop {
        let error = match open() {
            Ok(open) => return Ok(open),
            Err(error) => error,
        };
        let busy = matches!(error, ImageError::Busy(_));
        let fault = fault(error);
        if !busy || Instant::now() >= by || wanted.strong_count() == 0 {
            return Err(fault);
        }
        if !core::mem::replace(&mut told, true) {
            let _ = tell.send(News::Busy(fault));
            wake();
        }
        std::thread::sleep(AGAIN);
    }
}

/// A disk that is being closed.
pub(super) struct Closing(Receiver<()>);

impl Closing {
    /// Starts a thread that drops the disk.
    pub fn begin(open: Open, wake: Wake) -> Self {
        let (tell, over) = sync_channel::<()>(1);
        let work = move || {
            drop(open);
            drop(tell);
            wake();
        };
        // If no thread can be created, the disk is closed synchronously.
        let _ = Builder::new().name(String::from("close-disk")).spawn(work);
        Self(over)
    }

    /// Returns whether the disk is closed.
    pub fn is_over(&self) -> bool {
        self.0.try_recv() == Err(TryRecvError::Disconnected)
    }
}

#[cfg(test)]
mod tests {
    use super::super::size::ImageSize;
    use super::super::{Groups, fence};
    use super::*;
    use crate::image::Disk;
    use core::sync::atomic::{AtomicU32, Ordering};
    use pvio_recordfile::RecordDir;
    use std::os::fd::OwnedFd;

    const LONG: Duration = Duration::from_secs(30);

    fn memory() -> Result<Open, ImageError> {
        let disk: Disk = "ram:1M".parse().unwrap();
        Open::new(disk, &Groups::default(), None, ImageSize::new(Arc::default()), "disk")
    }

    /// Returns a record directory with a fence that is held.
    fn held() -> (tempfile::TempDir, RecordDir, OwnedFd) {
        let dir = tempfile::tempdir().unwrap();
        let records = RecordDir::open(&dir.path().join("records")).unwrap();
        let held = fence::pass(&records, "disk", LONG).unwrap();
        (dir, records, held)
    }

    #[test]
    fn fence_that_is_not_passed_is_the_reason_whatever_else_has_a_deadline() {
        let (_dir, records, _held) = held();
        let (fence, opening) = (Duration::from_secs(2), Duration::from_millis(1500));
        // The image must not be in use at all, as with busy-timeout=0s.
        let deadlines = Deadlines { fence, busy: Duration::ZERO, opening };
        let pass = move || fence::pass(&records, "disk", fence);
        let open = |_: &OwnedFd| panic!("the image is opened");
        let pending = Pending::begin("disk", deadlines, None, pass, open, Arc::new(|| ()));
        let fault = pending.unwrap().wait().err().unwrap();
        assert_eq!(fault.code, "image-fence");
    }

    #[test]
    fn time_for_a_busy_image_begins_when_the_fence_is_passed() {
        let (_dir, records, held) = held();
        let busy = Duration::from_secs(2);
        let deadlines = Deadlines { fence: LONG, busy, opening: LONG };
        let pass = move || fence::pass(&records, "disk", LONG);
        let tries = AtomicU32::new(0);
        let open = move |_: &OwnedFd| match tries.fetch_add(1, Ordering::Relaxed) {
            0 => Err(ImageError::Busy("disk".into())),
            _ => memory(),
        };
        let mut pending =
            Pending::begin("disk", deadlines, None, pass, open, Arc::new(|| ())).unwrap();
        // Longer than the time for which an image may be in use.
        std::thread::sleep(busy + AGAIN);
        assert!(pending.poll().is_none(), "the fence is held");
        drop(held);
        pending.wait().unwrap();
    }
}
