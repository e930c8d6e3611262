//! The disk thread, so that no other thread blocks on the disk.
//!
//! Requests are sent through [`FsThread`]. Replies arrive on a channel, each with the token of its
//! request; the waker is called after each. A panic in a library fails its request: the file system
//! is mounted again, and files that were open return [`FsError::Stale`].

use super::cache::Cache;
use super::ext::ExtFs;
use super::fat::{self, FatFs};
use super::probe::{self, Family};
use super::{BlockRead, Disk, FsError, FsInfo, Handle, Mounted, Target};
use crate::guest::meter::Shared;
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use pvio_runtime::LogLimit;
use std::cell::RefCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::thread::{self, JoinHandle};

/// Maximum number of bytes read for a visit: far more than the largest directory of FAT has.
const VISIT_BUDGET: u64 = 64 << 20;
/// Maximum number of bytes read for a read, in addition to the data returned: enough for the
/// longest FAT chain.
const READ_BUDGET: u64 = 64 << 20;
/// Maximum number of bytes read for mounting: journal and group descriptors of a large ext4.
const MOUNT_BUDGET: u64 = 4 << 30;
/// Maximum number of queued requests; a sender blocks when the queue is full.
pub const QUEUE: usize = 256;

/// Called by the disk thread after each reply.
pub type Waker = Box<dyn Fn() + Send>;

/// The disk thread; requests are sent through its methods.
#[derive(Debug)]
pub struct FsThread {
    requests: Option<Sender<FsRequest>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum FsRequest {
    Info { token: u64 },
    Visit { token: u64, path: Vec<u8>, index: bool },
    Read { token: u64, handle: Handle, offset: u64, buf: Vec<u8> },
    Close(Handle),
    PollBackend,
    ServeExit,
}

/// Requests background work of the disk, from any thread.
#[derive(Debug, Clone)]
pub struct BackendPoller(Sender<FsRequest>);

impl BackendPoller {
    /// Sends the request, unless the queue is full; then reads will reconnect the disk anyway.
    pub fn poll_backend(&self) {
        let _ = self.0.try_send(FsRequest::PollBackend);
    }
}

/// A reply, with the token of its request.
#[derive(Debug)]
pub struct FsResponse {
    /// The token of the request.
    pub token: u64,
    /// The result of the request.
    pub result: Result<Reply, FsError>,
}

/// The result of a successful request.
#[derive(Debug)]
pub enum Reply {
    /// The file system is mounted.
    Info(FsInfo),
    /// The path was found.
    Visited(Target),
    /// The bytes read: the buffer's length, or fewer at the end of the file.
    Read(Vec<u8>),
}

impl FsResponse {
    /// Returns the target of a visit.
    ///
    /// # Errors
    /// The error of the request; [`FsError::Gone`] if it was not a visit.
    pub fn visited(self) -> Result<Target, FsError> {
        match self.result? {
            Reply::Visited(target) => Ok(target),
            _ => Err(FsError::Gone),
        }
    }
}

impl FsThread {
    /// Starts the thread. Mounting is reported only in the reply to [`FsThread::info`], or as the
    /// error of another request.
    ///
    /// # Errors
    /// No thread can be created.
    pub fn start(disk: Disk, wake: Waker) -> io::Result<(Self, Receiver<FsResponse>)> {
        Self::start_metered(disk, wake, None)
    }

    /// Does as [`FsThread::start`]; `meter` counts reads of the disk.
    ///
    /// # Errors
    /// No thread can be created.
    pub fn start_metered(
        disk: Disk,
        wake: Waker,
        meter: Option<Shared>,
    ) -> io::Result<(Self, Receiver<FsResponse>)> {
        let (requests, inbox) = bounded(QUEUE);
        // There is at most one reply for each request, and requests are bounded.
        let (out, responses) = unbounded();
        let builder = thread::Builder::new().name("disk".into());
        let thread = builder.spawn(move || Worker { inbox, out, wake }.run(disk, meter))?;
        Ok((Self { requests: Some(requests), thread: Some(thread) }, responses))
    }

    /// Requests the mounted file system.
    ///
    /// # Errors
    /// [`FsError::Gone`].
    pub fn info(&self, token: u64) -> Result<(), FsError> {
        self.send(FsRequest::Info { token })
    }

    /// Requests the file or directory at `path`; with `index`, a directory's `index.html` if it has
    /// one.
    ///
    /// # Errors
    /// [`FsError::Gone`].
    pub fn visit(&self, token: u64, path: Vec<u8>, index: bool) -> Result<(), FsError> {
        self.send(FsRequest::Visit { token, path, index })
    }

    /// Requests `buf.len()` bytes of a file from `offset` on.
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
        self.send(FsRequest::Read { token, handle, offset, buf })
    }

    /// Closes a file.
    pub fn close(&self, handle: Handle) {
        let _ = self.send(FsRequest::Close(handle));
    }

    /// Returns a handle that requests background work of the disk.
    #[must_use]
    pub fn backend_poller(&self) -> Option<BackendPoller> {
        self.requests.clone().map(BackendPoller)
    }

    fn send(&self, request: FsRequest) -> Result<(), FsError> {
        self.requests.as_ref().and_then(|requests| requests.send(request).ok()).ok_or(FsError::Gone)
    }
}

impl Drop for FsThread {
    fn drop(&mut self) {
        // A `BackendPoller` may still hold a sender, so the channel does not close.
        let _ = self.send(FsRequest::ServeExit);
        drop(self.requests.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Worker {
    inbox: Receiver<FsRequest>,
    out: Sender<FsResponse>,
    wake: Waker,
}

/// Why a mount ended.
enum ServeExit {
    /// There are no more requests.
    Done,
    /// A library panicked; the file system has to be mounted again.
    Panicked,
}

impl Worker {
    fn run(self, disk: Disk, meter: Option<Shared>) {
        let size = disk.size();
        let cache = Rc::new(RefCell::new(Cache::new(disk, meter)));
        // Handles are not reused, even when the file system is mounted again.
        let mut handles = 0;
        let mut request = self.inbox.recv().ok();
        while let Some(first) =
            request.take().filter(|request| !matches!(request, FsRequest::ServeExit))
        {
            // A disk without a file system needs to reconnect to its backend as well.
            if matches!(first, FsRequest::PollBackend) {
                cache.borrow_mut().poll_backend();
                request = self.inbox.recv().ok();
                continue;
            }
            let exit =
                catch_unwind(AssertUnwindSafe(|| self.mount(&cache, size, &mut handles, first)));
            request = match exit {
                Ok(Ok(ServeExit::Done)) => None,
                Ok(Ok(ServeExit::Panicked)) => self.inbox.recv().ok(),
                // Mounting failed: this is the reply to the current request, and the next request
                // tries again.
                Ok(Err((e, request))) => {
                    static UNMOUNTED: LogLimit = LogLimit::new();
                    if let Some(unlogged) = UNMOUNTED.admit() {
                        let (code, error, remedy) = (e.code(), &e, e.remedy());
                        tracing::warn!(code, %error, remedy, unlogged, "the file system cannot be mounted");
                    }
                    self.fail(&request, e);
                    self.inbox.recv().ok()
                }
                // A panic that `mount` does not catch, such as in a destructor of the library. All
                // requests taken before it have their replies.
                Err(_) => self.inbox.recv().ok(),
            };
        }
    }

    fn mount(
        &self,
        cache: &Rc<RefCell<Cache>>,
        size: u64,
        handles: &mut u64,
        first: FsRequest,
    ) -> Result<ServeExit, (FsError, FsRequest)> {
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
        first: FsRequest,
    ) -> ServeExit {
        let mut next = Some(first);
        while let Some(request) = next.take().or_else(|| self.inbox.recv().ok()) {
            if matches!(request, FsRequest::ServeExit) {
                return ServeExit::Done;
            }
            let token = request.token();
            let served = catch_unwind(AssertUnwindSafe(|| execute(fs, cache, handles, request)));
            let (result, panic) = match served {
                Ok(result) => (result, false),
                Err(_) => (Some(Err(panicked())), true),
            };
            if let (Some(token), Some(result)) = (token, result) {
                self.send(FsResponse { token, result });
            }
            if panic {
                return ServeExit::Panicked;
            }
        }
        ServeExit::Done
    }

    fn fail(&self, request: &FsRequest, e: FsError) {
        if let Some(token) = request.token() {
            self.send(FsResponse { token, result: Err(e) });
        }
    }

    fn send(&self, response: FsResponse) {
        let _ = self.out.send(response);
        (self.wake)();
    }
}

impl FsRequest {
    fn token(&self) -> Option<u64> {
        match self {
            Self::Info { token } | Self::Visit { token, .. } | Self::Read { token, .. } => {
                Some(*token)
            }
            Self::Close(_) | Self::PollBackend | Self::ServeExit => None,
        }
    }
}

fn execute(
    fs: &mut dyn Mounted,
    cache: &RefCell<Cache>,
    handles: &mut u64,
    request: FsRequest,
) -> Option<Result<Reply, FsError>> {
    match request {
        FsRequest::Info { .. } => Some(Ok(Reply::Info(fs.info()))),
        FsRequest::Visit { path, index, .. } => {
            cache.borrow_mut().allow(VISIT_BUDGET);
            *handles += 1;
            Some(fs.visit(&path, index, Handle(*handles)).map(Reply::Visited))
        }
        FsRequest::Read { handle, offset, mut buf, .. } => {
            cache.borrow_mut().allow(READ_BUDGET + buf.len() as u64 * 2);
            Some(fs.read(handle, offset, &mut buf).map(|got| {
                buf.truncate(got);
                Reply::Read(buf)
            }))
        }
        FsRequest::Close(handle) => {
            fs.close(handle);
            None
        }
        FsRequest::PollBackend => {
            cache.borrow_mut().poll_backend();
            None
        }
        FsRequest::ServeExit => None,
    }
}

fn panicked() -> FsError {
    FsError::Corrupt("reading it made the library panic".into())
}
