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
/// How long opening may take, beyond that.
const OPENING: Duration = Duration::from_secs(60);

/// Wakes whoever drives the device.
pub(super) type Wake = Arc<dyn Fn() + Send + Sync>;

/// What a thread that opens a disk says.
enum News {
    Busy(Fault),
    Over(Result<Open, Fault>),
}

/// A disk that is being opened. The thread gives up soon after this is dropped.
pub(super) struct Pending {
    news: Receiver<News>,
    by: Instant,
    /// Why the disk is not open yet, if somebody has it.
    pub busy: Option<Fault>,
    _wanted: Arc<()>,
}

impl Pending {
    /// Starts a thread that calls `open`, for so long as that says that the image is busy; `before`,
    /// what was open, is closed first.
    pub fn begin(
        name: &str,
        busy: Duration,
        before: Option<Open>,
        open: impl Fn() -> Result<Open, ImageError> + Send + 'static,
        wake: Wake,
    ) -> Result<Self, Fault> {
        let (tell, news) = sync_channel(2);
        let wanted = Arc::new(());
        let weak = Arc::downgrade(&wanted);
        let by = Instant::now() + busy;
        let work = move || {
            drop(before);
            let work = || patiently(&open, by, &weak, &tell, &wake);
            let outcome = catch_unwind(AssertUnwindSafe(work));
            let panicked = || Fault::new("image-panic", "opening the image failed by a panic");
            let _ = tell.send(News::Over(outcome.unwrap_or_else(|_| Err(panicked()))));
            wake();
        };
        let spawned = Builder::new().name(format!("open-{name}")).spawn(work);
        let failed = |e| Fault::new("worker", format!("no thread to open the disk: {e}"));
        spawned.map_err(failed)?;
        Ok(Self { news, by: by + OPENING, busy: None, _wanted: wanted })
    }

    /// What has become of it.
    pub fn poll(&mut self) -> Option<Result<Open, Fault>> {
        loop {
            match self.news.try_recv() {
                Ok(News::Busy(fault)) => self.busy = Some(fault),
                Ok(News::Over(outcome)) => return Some(outcome),
                Err(TryRecvError::Empty) if Instant::now() < self.by => return None,
                Err(_) => return Some(Err(too_long())),
            }
        }
    }

    /// Waits for it.
    pub fn wait(&mut self) -> Result<Open, Fault> {
        loop {
            match self.news.recv_timeout(self.by.saturating_duration_since(Instant::now())) {
                Ok(News::Busy(_)) => {}
                Ok(News::Over(outcome)) => return outcome,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    return Err(too_long());
                }
            }
        }
    }
}

fn too_long() -> Fault {
    let text = "opening the image takes too long: does its storage answer?";
    Fault::new("image-timeout", text)
}

fn patiently(
    open: &impl Fn() -> Result<Open, ImageError>,
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
        let fault = Fault::new(error.code(), &error);
        if !matches!(error, ImageError::Busy(_))
            || Instant::now() >= by
            || wanted.strong_count() == 0
        {
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
