//! Opening and closing a disk on threads of their own: each takes as long as storage, or a server,
//! takes.

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

/// How long an image that is in use elsewhere is waited for, if nothing is said: as long as a
/// migration takes from the start of the new domain to the end of the old.
pub const BUSY: Duration = Duration::from_secs(30);
/// How often it is tried again.
const AGAIN: Duration = Duration::from_millis(50);

/// How long each step of opening may take. A later step's time begins when the one before is over, so that
/// the step which takes too long is the one that is reported.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadlines {
    /// For the I/O of an earlier process to end. A disk of the kernel's gives a command up after 30 s.
    pub fence: Duration,
    /// For an image that is in use.
    pub busy: Duration,
    /// For opening it, beyond that.
    pub opening: Duration,
}

impl Deadlines {
    /// Those of a disk whose image may be in use for so long.
    pub const fn of(busy: Duration) -> Self {
        Self { fence: Duration::from_secs(90), busy, opening: Duration::from_secs(60) }
    }
}

/// Wakes whoever drives the device.
pub(super) type Wake = Arc<dyn Fn() + Send + Sync>;

/// What a thread that opens a disk says.
enum News {
    /// No I/O of an earlier process is under way.
    Fenced,
    Busy(Fault),
    Over(Result<Open, Fault>),
}

/// A disk that is being opened. The thread gives up soon after this is dropped.
pub(super) struct Pending {
    news: Receiver<News>,
    deadlines: Deadlines,
    by: Instant,
    /// Why the disk is not open yet, if somebody has it.
    pub busy: Option<Fault>,
    _wanted: Arc<()>,
}

impl Pending {
    /// Starts a thread that passes the fence and then calls `open`, for so long as that says that the image
    /// is busy; `before`, what was open, is closed first.
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
            let panicked = || Fault::new("image-panic", "opening the image failed by a panic");
            let _ = tell.send(News::Over(outcome.unwrap_or_else(|_| Err(panicked()))));
            wake();
        };
        let spawned = Builder::new().name(format!("open-{name}")).spawn(work);
        let failed = |e| Fault::new("worker", format!("no thread to open the disk: {e}"));
        spawned.map_err(failed)?;
        // The fence reports its own deadline.
        let by = Instant::now() + deadlines.fence + deadlines.opening;
        Ok(Self { news, deadlines, by, busy: None, _wanted: wanted })
    }

    /// What has become of it.
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

    /// Waits for it.
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
    Fault::new(error.code(), error)
}

fn too_long() -> Fault {
    let text = "opening the image takes too long: does its storage answer?";
    Fault::new("image-timeout", text)
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
    /// Starts a thread that drops it.
    pub fn begin(open: Open, wake: Wake) -> Self {
        let (tell, over) = sync_channel::<()>(1);
        let work = move || {
            drop(open);
            drop(tell);
            wake();
        };
        // Without a thread to be had, it is closed here and now.
        let _ = Builder::new().name(String::from("close-disk")).spawn(work);
        Self(over)
    }

    /// Whether it is closed.
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

    /// A disk whose fence somebody holds.
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
        // The image may not be in use at all, as busy-timeout=0s has it.
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
        // Longer than an image may be in use.
        std::thread::sleep(busy + AGAIN);
        assert!(pending.poll().is_none(), "the fence is held");
        drop(held);
        pending.wait().unwrap();
    }
}
