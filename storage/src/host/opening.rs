//! Opening and closing of a disk on separate threads, because both block for as long as storage or
//! a server does.

use super::disk::{DiskParts, OpenDisk};
use super::groups::Groups;
use super::trace::TraceFile;
use crate::image::{Disk, Image, ImageError};
use alloc::format;
use alloc::sync::{Arc, Weak};
use core::task::Poll;
use pvio_runtime::{LogLimit, Notify, Task, TaskError};
use pvio_xenbus::driver::Fault;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Default time to wait for an image that is in use elsewhere: as long as a migration takes from
/// the start of the new domain to the end of the old one.
pub const BUSY: Duration = Duration::from_secs(30);
/// Interval between attempts to open.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// Timeouts of the steps of opening. The time of a step begins when the previous step ends, so that
/// the error names the step that takes too long.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
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
    #[must_use]
    pub const fn of(busy: Duration) -> Self {
        Self { fence: Duration::from_secs(90), busy, opening: Duration::from_secs(60) }
    }
}

/// The reason why a disk could not be opened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OpenFailure {
    /// What failed.
    pub fault: Fault,
    /// Whether its image is in use elsewhere: opening is retried.
    pub busy: bool,
}

impl From<ImageError> for OpenFailure {
    fn from(error: ImageError) -> Self {
        let busy = matches!(error, ImageError::Busy(_));
        Self { fault: Fault::of(error.code(), &error), busy }
    }
}

/// A disk that is being opened, on a thread. The thread ends soon after this is dropped.
pub struct OpeningTask<T> {
    task: Task<Result<T, Fault>>,
    progress: Arc<Mutex<Progress>>,
    _wanted: Arc<()>,
}

/// What the thread reports before it has an outcome.
struct Progress {
    /// Time by which the current step must end.
    deadline: Instant,
    /// The reason why the disk is not open, if its image is in use elsewhere.
    busy: Option<Fault>,
}

impl<T: Send + 'static> OpeningTask<T> {
    /// Starts a thread that waits for the fence and then calls `open`, repeatedly while that fails
    /// because the image is busy. `before`, the previously open disk, is closed first.
    ///
    /// # Errors
    /// A [`Fault`] if the system has no thread.
    pub fn begin<F>(
        name: &str,
        deadlines: Deadlines,
        before: impl Send + 'static,
        fence: impl FnOnce() -> Result<F, ImageError> + Send + 'static,
        open: impl Fn(&F) -> Result<T, OpenFailure> + Send + 'static,
        wake: Notify,
    ) -> Result<Self, Fault> {
        let wanted = Arc::new(());
        let weak = Arc::downgrade(&wanted);
        // The fence reports its own timeout.
        let deadline = Instant::now() + deadlines.fence + deadlines.opening;
        let progress = Arc::new(Mutex::new(Progress { deadline, busy: None }));
        let (reported, busy_wake) = (Arc::clone(&progress), Arc::clone(&wake));
        let work = move || {
            drop(before);
            let fence = fence().map_err(|error| OpenFailure::from(error).fault)?;
            let busy_until = Instant::now() + deadlines.busy;
            lock(&reported).deadline = busy_until + deadlines.opening;
            let report = |busy| {
                lock(&reported).busy = Some(busy);
                busy_wake();
            };
            open_when_free(|| open(&fence), busy_until, &weak, report)
        };
        let failed =
            |e| Fault::new("worker", format!("the thread that opens the disk cannot start: {e}"));
        let task = Task::spawn(format!("open-{name}"), work, move || wake()).map_err(failed)?;
        Ok(Self { task, progress, _wanted: wanted })
    }

    /// Returns the reason why the disk is not open, if its image is in use elsewhere.
    #[must_use]
    pub fn busy(&self) -> Option<Fault> {
        lock(&self.progress).busy.clone()
    }

    /// Returns the outcome, if there is one.
    pub fn poll(&mut self) -> Poll<Result<T, Fault>> {
        self.task.set_deadline(lock(&self.progress).deadline);
        self.task.poll().map(outcome)
    }

    /// Waits for the outcome.
    ///
    /// # Errors
    /// The [`Fault`] of opening.
    pub fn wait(&mut self) -> Result<T, Fault> {
        loop {
            let deadline = lock(&self.progress).deadline;
            self.task.set_deadline(deadline);
            match self.task.wait() {
                // The deadline is that of the next step now.
                Err(TaskError::TimedOut) if lock(&self.progress).deadline > deadline => {}
                opened => return outcome(opened),
            }
        }
    }
}

fn lock(progress: &Mutex<Progress>) -> MutexGuard<'_, Progress> {
    progress.lock().unwrap_or_else(PoisonError::into_inner)
}

fn outcome<T>(opened: Result<Result<T, Fault>, TaskError>) -> Result<T, Fault> {
    opened.unwrap_or_else(|error| {
        Err(match error {
            TaskError::Panicked => {
                Fault::new("image-panic", "opening the image failed: the thread panicked")
            }
            TaskError::TimedOut => {
                let remedy =
                    "check whether its storage responds, then detach the disk and attach it again";
                Fault::new("image-timeout", "opening the image failed: it takes too long")
                    .with_remedy(remedy)
            }
        })
    })
}

/// Calls `open` until it succeeds or fails for another reason than that the image is in use.
fn open_when_free<T>(
    open: impl Fn() -> Result<T, OpenFailure>,
    until: Instant,
    wanted: &Weak<()>,
    report: impl FnOnce(Fault),
) -> Result<T, Fault> {
    let mut report = Some(report);
    loop {
        let OpenFailure { fault, busy } = match open() {
            Ok(open) => return Ok(open),
            Err(failure) => failure,
        };
        if !busy || Instant::now() >= until || wanted.strong_count() == 0 {
            return Err(fault);
        }
        if let Some(report) = report.take() {
            report(fault);
        }
        std::thread::sleep(RETRY_INTERVAL);
    }
}

/// Opens a disk's image and creates the file of its trace.
pub(super) fn open(
    disk: &Disk,
    groups: &Groups,
    fence: Option<&OwnedFd>,
    unsized_images: Arc<LogLimit>,
    name: &str,
) -> Result<OpenDisk, ImageError> {
    let throttles = groups.throttles(&disk.options);
    let image = Image::open_as(disk)?;
    let failed = |error| ImageError::Other { path: name.into(), error };
    let fence = fence.map(OwnedFd::try_clone).transpose().map_err(failed)?;
    let trace = disk.options.trace.as_ref();
    let trace = trace.map(|path| TraceFile::create(path, &disk.spec, name)).transpose()?;
    let parts = DiskParts { image, throttles, fence, trace, unsized_images };
    let open = OpenDisk::new(disk, parts)?;
    tracing::info!(disk = name, image = %disk, "disk opened");
    Ok(open)
}

/// Starts a thread that closes a disk. Without a thread, the disk is closed here, which blocks.
pub(super) fn close(open: Arc<OpenDisk>, wake: Notify) -> Option<Task<()>> {
    Task::spawn("close-disk", move || drop(open), move || wake()).ok()
}

#[cfg(test)]
mod tests {
    use super::super::fence;
    use super::*;
    use core::sync::atomic::{AtomicU32, Ordering};
    use pvio_recordfile::RecordDir;

    const LONG: Duration = Duration::from_secs(30);

    fn memory() -> Result<OpenDisk, OpenFailure> {
        let disk: Disk = "ram:1M".parse().unwrap();
        Ok(super::open(&disk, &Groups::default(), None, Arc::default(), "disk")?)
    }

    /// Returns a record directory with a fence that is held.
    fn held() -> (tempfile::TempDir, RecordDir, OwnedFd) {
        let dir = tempfile::tempdir().unwrap();
        let records = RecordDir::open(&dir.path().join("records")).unwrap();
        let held = fence::pass_fence(&records, "disk", LONG).unwrap();
        (dir, records, held)
    }

    #[test]
    fn fence_timeout_is_reported_before_other_deadlines() {
        let (_dir, records, _held) = held();
        let (fence, opening) = (Duration::from_secs(2), Duration::from_millis(1500));
        // The image must not be in use at all, as with busy-timeout=0s.
        let deadlines = Deadlines { fence, busy: Duration::ZERO, opening };
        let pass = move || fence::pass_fence(&records, "disk", fence);
        let open = |_: &OwnedFd| panic!("image was opened before the fence was passed");
        let pending =
            OpeningTask::<OpenDisk>::begin("disk", deadlines, (), pass, open, Arc::new(|| ()));
        let fault = pending.unwrap().wait().err().unwrap();
        assert_eq!(fault.code, "image-fence");
    }

    #[test]
    fn busy_timeout_starts_after_fence_is_passed() {
        let (_dir, records, held) = held();
        let busy = Duration::from_secs(2);
        let deadlines = Deadlines { fence: LONG, busy, opening: LONG };
        let pass = move || fence::pass_fence(&records, "disk", LONG);
        let tries = AtomicU32::new(0);
        let open = move |_: &OwnedFd| match tries.fetch_add(1, Ordering::Relaxed) {
            0 => Err(ImageError::Busy("disk".into()).into()),
            _ => memory(),
        };
        let mut pending =
            OpeningTask::<OpenDisk>::begin("disk", deadlines, (), pass, open, Arc::new(|| ()))
                .unwrap();
        // Longer than the time for which an image may be in use.
        std::thread::sleep(busy + RETRY_INTERVAL);
        assert!(pending.poll().is_pending(), "the fence is held");
        drop(held);
        pending.wait().unwrap();
    }
}
