//! The disk thread: whoever asks never waits for the disk.
//!
//! Requests go in by [`FsThread`], answers come out of a channel, each with the token of its
//! request; the waker given at the start is called after each. A panic below costs its request:
//! the file system is mounted anew, and the files that were open answer [`FsError::Stale`].

use super::cache::Cache;
use super::ext::ExtFs;
use super::fat::{self, FatFs};
use super::probe::{self, Family};
use super::{BlockRead, Disk, FsError, FsInfo, Handle, Mounted, Target};
use crate::guest::meter::Shared;
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use pvio_uring::LogLimit;
use std::cell::RefCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::thread::{self, JoinHandle};

/// Bytes one visit may read: far more than the largest directory of FAT has.
const VISIT_BUDGET: u64 = 64 << 20;
/// Bytes one read may read on top of what it is to return: a walk along the longest FAT chain.
const READ_BUDGET: u64 = 64 << 20;
/// Bytes mounting may read: journal and group descriptors of a large ext4.
const MOUNT_BUDGET: u64 = 4 << 30;
/// Requests waiting at most; whoever has more waits before asking.
pub const QUEUE: usize = 256;

/// Called from the disk thread when an answer lies ready.
pub type Waker = Box<dyn Fn() + Send>;

/// Where to ask.
#[derive(Debug)]
pub struct FsThread {
    asks: Option<Sender<Ask>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Ask {
    Info { token: u64 },
    Visit { token: u64, path: Vec<u8>, index: bool },
    Read { token: u64, handle: Handle, offset: u64, buf: Vec<u8> },
    Close(Handle),
    Tend,
    End,
}

/// Has the disk look after itself, from any thread.
#[derive(Debug, Clone)]
pub struct Nudge(Sender<Ask>);

impl Nudge {
    /// Asks for it, unless there is so much to do that the disk is looked after anyway.
    pub fn tend(&self) {
        let _ = self.0.try_send(Ask::Tend);
    }
}

/// An answer, with the token of what was asked.
#[derive(Debug)]
pub struct Answer {
    /// The request's.
    pub token: u64,
    /// What came of it.
    pub result: Result<Reply, FsError>,
}

/// What came of a request.
#[derive(Debug)]
pub enum Reply {
    /// The file system is mounted.
    Info(FsInfo),
    /// The path was found.
    Visited(Target),
    /// As many bytes as there were, up to the buffer's length.
    Read(Vec<u8>),
}

impl Answer {
    /// The target, if a visit found one.
    ///
    /// # Errors
    /// The answer's; [`FsError::Gone`] if it answers something else.
    pub fn visited(self) -> Result<Target, FsError> {
        match self.result? {
            Reply::Visited(target) => Ok(target),
            _ => Err(FsError::Gone),
        }
    }
}

impl FsThread {
    /// Starts the thread. The first answer to come tells whether the disk could be mounted only
    /// if it is asked for: [`FsThread::info`].
    ///
    /// # Errors
    /// When no thread can be made.
    pub fn start(disk: Disk, wake: Waker) -> io::Result<(Self, Receiver<Answer>)> {
        Self::start_metered(disk, wake, None)
    }

    /// As [`FsThread::start`]; `meter` counts what is read from the disk.
    ///
    /// # Errors
    /// When no thread can be made.
    pub fn start_metered(
        disk: Disk,
        wake: Waker,
        meter: Option<Shared>,
    ) -> io::Result<(Self, Receiver<Answer>)> {
        let (asks, inbox) = bounded(QUEUE);
        // Never more answers than questions, and those are bounded.
        let (out, answers) = unbounded();
        let builder = thread::Builder::new().name("disk".into());
        let thread = builder.spawn(move || Worker { inbox, out, wake }.run(disk, meter))?;
        Ok((Self { asks: Some(asks), thread: Some(thread) }, answers))
    }

    /// Asks what is mounted.
    ///
    /// # Errors
    /// [`FsError::Gone`].
    pub fn info(&self, token: u64) -> Result<(), FsError> {
        self.send(Ask::Info { token })
    }

    /// Asks for what is at `path`; with `index`, for a directory's `index.html` if it has one.
    ///
    /// # Errors
    /// [`FsError::Gone`].
    pub fn visit(&self, token: u64, path: Vec<u8>, index: bool) -> Result<(), FsError> {
        self.send(Ask::Visit { token, path, index })
    }

    /// Asks for `buf.len()` bytes of a file from `offset` on.
    ///
    /// # Errors
    /// [`FsError::Gone`].
    pub fn read(
        &self,
        token: u64,
        handle: Handle,
        offset: u64,
        buf: Vec<u8>,
    ) -> Result<(), FsError> {
        self.send(Ask::Read { token, handle, offset, buf })
    }

    /// Closes a file.
    pub fn close(&self, handle: Handle) {
        let _ = self.send(Ask::Close(handle));
    }

    /// A way to have the disk look after itself.
    #[must_use]
    pub fn nudge(&self) -> Option<Nudge> {
        self.asks.clone().map(Nudge)
    }

    fn send(&self, ask: Ask) -> Result<(), FsError> {
        self.asks.as_ref().and_then(|asks| asks.send(ask).ok()).ok_or(FsError::Gone)
    }
}

impl Drop for FsThread {
    fn drop(&mut self) {
        // Nudges may be held for longer, so that the channel stays open.
        let _ = self.send(Ask::End);
        drop(self.asks.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Worker {
    inbox: Receiver<Ask>,
    out: Sender<Answer>,
    wake: Waker,
}

/// Why serving ended.
enum End {
    /// Nobody asks any more.
    Done,
    /// A library panicked; mount anew.
    Panicked,
}

impl Worker {
    fn run(self, disk: Disk, meter: Option<Shared>) {
        let size = disk.size();
        let cache = Rc::new(RefCell::new(Cache::new(disk, meter)));
        // A handle is never used twice, not even after mounting anew.
        let mut handles = 0;
        let mut ask = self.inbox.recv().ok();
        while let Some(first) = ask.take().filter(|ask| !matches!(ask, Ask::End)) {
            // Also a disk that holds nothing to be mounted has a backend that comes and goes.
            if matches!(first, Ask::Tend) {
                cache.borrow_mut().tend();
                ask = self.inbox.recv().ok();
                continue;
            }
            let ended =
                catch_unwind(AssertUnwindSafe(|| self.mount(&cache, size, &mut handles, first)));
            ask = match ended {
                Ok(Ok(End::Done)) => None,
                Ok(Ok(End::Panicked)) => self.inbox.recv().ok(),
                // Not mounted: that is the answer to this one; the next one tries again.
                Ok(Err((e, ask))) => {
                    static UNMOUNTED: LogLimit = LogLimit::new();
                    if let Some(unlogged) = UNMOUNTED.admit() {
                        tracing::warn!(code = e.code(), unlogged, "{e}");
                    }
                    self.refuse(&ask, e);
                    self.inbox.recv().ok()
                }
                // Panicked while mounting; the request went with it, unanswered only if it is
                // a mount for nobody, since `mount` answers before it serves.
                Err(_) => self.inbox.recv().ok(),
            };
        }
    }

    fn mount(
        &self,
        cache: &Rc<RefCell<Cache>>,
        size: u64,
        handles: &mut u64,
        first: Ask,
    ) -> Result<End, (FsError, Ask)> {
        let opened = catch_unwind(AssertUnwindSafe(|| {
            let family = probe::family(&mut cache.borrow_mut())?;
            cache.borrow_mut().allow(MOUNT_BUDGET);
            Ok(match family {
                Family::Ext => (Some(ExtFs::mount(cache)?), None),
                Family::Fat => (None, Some(fat::open(cache)?)),
            })
        }));
        let opened = opened.unwrap_or_else(|_| Err(panicked()));
        match opened {
            Ok((Some(mut ext), _)) => Ok(self.serve(&mut ext, cache, handles, first)),
            Ok((_, Some(fs))) => Ok(self.serve(&mut FatFs::new(&fs, size), cache, handles, first)),
            Ok(_) => Err((FsError::Gone, first)),
            Err(e) => Err((e, first)),
        }
    }

    fn serve(
        &self,
        fs: &mut dyn Mounted,
        cache: &RefCell<Cache>,
        handles: &mut u64,
        first: Ask,
    ) -> End {
        let mut next = Some(first);
        while let Some(ask) = next.take().or_else(|| self.inbox.recv().ok()) {
            if matches!(ask, Ask::End) {
                return End::Done;
            }
            let token = ask.token();
            let served = catch_unwind(AssertUnwindSafe(|| answer(fs, cache, handles, ask)));
            let (result, panic) = match served {
                Ok(result) => (result, false),
                Err(_) => (Some(Err(panicked())), true),
            };
            if let (Some(token), Some(result)) = (token, result) {
                self.send(Answer { token, result });
            }
            if panic {
                return End::Panicked;
            }
        }
        End::Done
    }

    fn refuse(&self, ask: &Ask, e: FsError) {
        if let Some(token) = ask.token() {
            self.send(Answer { token, result: Err(e) });
        }
    }

    fn send(&self, answer: Answer) {
        let _ = self.out.send(answer);
        (self.wake)();
    }
}

impl Ask {
    fn token(&self) -> Option<u64> {
        match self {
            Self::Info { token } | Self::Visit { token, .. } | Self::Read { token, .. } => {
                Some(*token)
            }
            Self::Close(_) | Self::Tend | Self::End => None,
        }
    }
}

fn answer(
    fs: &mut dyn Mounted,
    cache: &RefCell<Cache>,
    handles: &mut u64,
    ask: Ask,
) -> Option<Result<Reply, FsError>> {
    match ask {
        Ask::Info { .. } => Some(Ok(Reply::Info(fs.info()))),
        Ask::Visit { path, index, .. } => {
            cache.borrow_mut().allow(VISIT_BUDGET);
            *handles += 1;
            Some(fs.visit(&path, index, Handle(*handles)).map(Reply::Visited))
        }
        Ask::Read { handle, offset, mut buf, .. } => {
            cache.borrow_mut().allow(READ_BUDGET + buf.len() as u64 * 2);
            Some(fs.read(handle, offset, &mut buf).map(|got| {
                buf.truncate(got);
                Reply::Read(buf)
            }))
        }
        Ask::Close(handle) => {
            fs.close(handle);
            None
        }
        Ask::Tend => {
            cache.borrow_mut().tend();
            None
        }
        Ask::End => None,
    }
}

fn panicked() -> FsError {
    FsError::Corrupt("reading it made the library panic".into())
}
