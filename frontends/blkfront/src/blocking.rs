//! A disk for user space: attach, blocking reads and writes, reconnect. Used by one thread.

use crate::disk::{Disk, RequestedFeatures};
use crate::queue::{BackendFault, Op, Queue, Shape, SlotId};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::Granter;
use pvio_ring::error::Remedy;
use pvio_ring::proto::blkif::Status;
use pvio_runtime::Spin;
use pvio_xenbus::driver::{Fault, FrontendDriver, Life};
use pvio_xenbus::handshake::common::{
    DeviceAddr, FrontendAddr, error_path, read_error, read_state,
};
use pvio_xenbus::handshake::vbd::read_sector_size;
use pvio_xenbus::{XenbusState, Xenstore, XsError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::borrow::Cow;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Why a disk cannot be used, or can no longer be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// xenstore failed: the hypervisor is gone.
    #[error("the connection to xenstore failed")]
    Xenstore(#[from] XsError),
    /// No backend accepted the frontend within this time. [`Remedy`] returns what to
    /// do.
    #[error("disk not served after {waited:?}: its backend is {backend} (its state is {state})")]
    NoBackend {
        /// Time waited.
        waited: Duration,
        /// The backend's state when the wait ended.
        state: XenbusState,
        /// The backend's directory in xenstore.
        backend: String,
        /// Size of the logical sectors that the backend advertises, if it advertises it before it
        /// connects.
        sector_size: Option<u32>,
    },
    /// The frontend or the backend closed the device; the error text of the one that wrote a
    /// reason.
    #[error("the disk was closed: {0}")]
    Closed(String),
    /// The backend failed or rejected the request.
    #[error("the backend could not do {0:?}")]
    Failed(Op),
    /// The request is out of bounds, or not a whole number of sectors.
    #[error("request out of range: {0} bytes at {1} are not whole sectors of the disk")]
    OutOfRange(usize, u64),
    /// Waiting failed.
    #[error("waiting for the backend failed")]
    Wait(#[source] Errno),
}

impl Remedy for DiskError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        let (state, backend, sector_size) = match self {
            Self::NoBackend { state, backend, sector_size, .. } => (state, backend, sector_size),
            Self::Xenstore(error) => return error.remedy(),
            Self::Closed(_) | Self::Failed(_) | Self::OutOfRange(..) | Self::Wait(_) => {
                return None;
            }
        };
        Some(match (state, sector_size) {
            (XenbusState::Unknown, _) => {
                "check that the backend's domain is running and that the toolstack has created the device"
                    .into()
            }
            (XenbusState::Initialising, _) => {
                "start a backend for such disks in the backend's domain (a kernel module, a device \
                 model, or pvio serve)"
                    .into()
            }
            // QEMU writes no reason to xenstore when it rejects a frontend.
            (XenbusState::InitWait, Some(size)) if *size > 512 => format!(
                "give the disk logical sectors of 512 bytes at its backend, instead of {size}: QEMU \
                 before 2025 rejects frontends that count in sectors of 512 bytes otherwise"
            )
            .into(),
            _ => format!(
                "see the backend's reason in xenstore, at {}, and its log",
                error_path(backend).unwrap_or_default()
            )
            .into(),
        })
    }
}

/// A disk attached to a user-space domain. `X` is a xenstore connection used by this session only.
pub struct BlockingDisk<P: Granter + EventChannels + Clone, X> {
    driver: FrontendDriver<Disk<P>>,
    xs: X,
    spin: Spin,
    /// Time that requests wait for an absent backend before they fail.
    patience: Duration,
}

impl<P, X> BlockingDisk<P, X>
where
    P: Granter + EventChannels + Clone,
    P::Channel: AsFd,
    X: Xenstore + AsFd,
{
    /// Attaches a disk and waits until its backend is connected, for at most `patience`. Later,
    /// requests wait as long for a backend that restarts. The backend's path is read from the
    /// frontend's directory: of `addr`, the backend's kind and domain are ignored.
    ///
    /// # Errors
    /// [`DiskError::NoBackend`], [`DiskError::Closed`] with the backend's error text, or
    /// [`DiskError::Xenstore`].
    pub fn attach(
        platform: P,
        xs: X,
        addr: DeviceAddr,
        patience: Duration,
    ) -> Result<Self, DiskError> {
        Self::attach_with(platform, xs, addr, Shape::LEAST, patience)
    }

    /// Attaches as [`attach`](Self::attach) does, with a larger queue if the backend advertises it.
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub fn attach_with(
        platform: P,
        xs: X,
        addr: DeviceAddr,
        requested: Shape,
        patience: Duration,
    ) -> Result<Self, DiskError> {
        let requested = RequestedFeatures { shape: requested, ..RequestedFeatures::default() };
        Self::attach_requesting(platform, xs, addr, requested, patience)
    }

    /// Attaches as [`attach`](Self::attach) does, with all features that are both requested and
    /// advertised. A [`FrontendAddr`] names a disk whose backend is of a kind that pvio does not
    /// know.
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub fn attach_requesting<A: Into<FrontendAddr>>(
        platform: P,
        xs: X,
        addr: A,
        requested: RequestedFeatures,
        patience: Duration,
    ) -> Result<Self, DiskError> {
        let driver = FrontendDriver::new(addr, Disk::with(platform, requested));
        let mut session = Self { driver, xs, spin: Spin::default(), patience };
        session.driver.step(&mut session.xs)?;
        session.until_connected()?;
        Ok(session)
    }

    /// Returns the device.
    pub fn device(&self) -> &Disk<P> {
        self.driver.class()
    }

    /// Takes a queue for exclusive use by a thread, once the disk is connected. `None` if the disk
    /// has no such queue, or it is taken. While it is taken, the caller must [step](Self::tend) the
    /// session.
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub fn take(&mut self, number: usize) -> Result<Option<Queue<P>>, DiskError> {
        self.until_connected()?;
        Ok(self.driver.class_mut().take(number))
    }

    /// Puts a queue back; call it as soon as the queue's session [is over](Queue::is_over).
    ///
    /// # Errors
    /// [`DiskError::Closed`] when the backend cannot be reached any more.
    pub fn put_back(&mut self, queue: Queue<P>) -> Result<(), DiskError> {
        match self.driver.class_mut().put_back(queue) {
            Ok(()) => Ok(()),
            Err(fault) => Err(self.fail_with(&fault)),
        }
    }

    /// Steps the device: handles xenstore events, sleeps until the next event or for `most`, and
    /// handles events again. Returns whether the disk is connected.
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub fn tend(&mut self, most: Duration) -> Result<bool, DiskError> {
        self.events()?;
        self.sleep(most)?;
        self.events()?;
        if self.driver.is_closing() {
            return Err(DiskError::Closed(self.reason()));
        }
        Ok(self.driver.class().is_connected())
    }

    /// Changes how long later requests wait for an absent backend.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// Returns the frontend's xenbus state.
    pub fn state(&self) -> XenbusState {
        self.driver.state()
    }

    /// Returns the size of the disk, in bytes.
    pub fn size(&self) -> u64 {
        self.device().served().map_or(0, |disk| disk.sectors.saturating_mul(512))
    }

    /// Returns the first queue, once the disk is connected.
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub fn queue(&mut self) -> Result<&mut Queue<P>, DiskError> {
        self.until_connected()?;
        self.driver.class_mut().queue().ok_or_else(|| DiskError::Closed(String::new()))
    }

    /// Waits for responses to requests in flight and calls `each` for every response received. If
    /// the backend dies during the wait, waits for the next one; the requests are submitted to it
    /// again.
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub fn answers(
        &mut self,
        mut each: impl FnMut(SlotId, Op, Status),
    ) -> Result<usize, DiskError> {
        let mut deadline = Instant::now() + self.patience;
        loop {
            self.events()?;
            let Some(queue) = self.driver.class_mut().queue() else {
                self.until_connected()?;
                deadline = Instant::now() + self.patience;
                continue;
            };
            let step = match self.spin.until(|| queue.has_answers()) {
                Ok(false) => queue.final_check(),
                found => found,
            };
            match step {
                Ok(true) => match queue.poll(&mut each) {
                    Ok(count) => return Ok(count),
                    Err(fault) => return Err(self.fail(fault)),
                },
                Ok(false) if Instant::now() >= deadline => return Err(self.no_backend()),
                Ok(false) => {
                    self.spin.sleeping();
                    self.sleep(Duration::from_secs(1))?;
                }
                Err(fault) => return Err(self.fail(fault)),
            }
        }
    }

    /// Fills `buf` from byte `offset` on, with as many concurrent requests as needed. Responses to
    /// requests that an earlier call abandoned are taken and dropped.
    ///
    /// # Errors
    /// Any [`DiskError`].
    pub fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.size());
        let sector = self.device().served().map_or(512, |disk| disk.sector_size as usize);
        let whole = offset.is_multiple_of(sector as u64) && buf.len().is_multiple_of(sector);
        if end.is_none() || !whole {
            return Err(DiskError::OutOfRange(buf.len(), offset));
        }
        let mut sent = 0;
        // Requests of this call in flight, and the position in `buf` of each.
        let mut mine: Vec<(SlotId, usize)> = Vec::new();
        let mut done: Vec<SlotId> = Vec::new();
        let mut failed = None;
        loop {
            let queue = self.queue()?;
            while sent < buf.len() && failed.is_none() {
                // No slot is free while abandoned requests are outstanding.
                let Some(slot) = queue.reserve() else { break };
                let bytes = (buf.len() - sent).min(queue.slot_bytes());
                let op = Op::Read { sector: (offset + sent as u64) / 512, bytes };
                if queue.start(slot, op).is_err() {
                    queue.release(slot);
                    return Err(DiskError::Failed(op));
                }
                mine.push((slot, sent));
                sent += bytes;
            }
            if let Err(fault) = queue.publish() {
                return Err(self.fail(fault));
            }
            match failed {
                Some(op) if mine.is_empty() => return Err(DiskError::Failed(op)),
                None if mine.is_empty() && sent == buf.len() => return Ok(()),
                _ => {}
            }
            self.answers(|slot, op, status| {
                if status != Status::Okay && mine.iter().any(|(s, _)| *s == slot) {
                    failed = Some(op);
                }
                done.push(slot);
            })?;
            let queue = self.queue()?;
            for slot in done.drain(..) {
                if let Some(i) = mine.iter().position(|(s, _)| *s == slot) {
                    let (_, at) = mine.swap_remove(i);
                    let bytes = (buf.len() - at).min(queue.slot_bytes());
                    let _ = queue.fetch(slot, 0, &mut buf[at..at + bytes]);
                }
                queue.release(slot);
            }
        }
    }

    /// Closes the device with the xenbus handshake, waiting for the backend at most `patience`.
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub fn close(mut self) -> Result<(), DiskError> {
        self.driver.close(&mut self.xs)?;
        let deadline = Instant::now() + self.patience;
        while self.driver.step(&mut self.xs)? == Life::Alive
            && self.driver.state() != XenbusState::Closed
            && Instant::now() < deadline
        {
            while self.xs.poll_event()?.is_some() {}
            self.sleep(Duration::from_millis(100))?;
        }
        Ok(())
    }

    fn fail(&mut self, fault: BackendFault) -> DiskError {
        self.fail_with(&Fault::of(fault.code(), &fault))
    }

    fn fail_with(&mut self, fault: &Fault) -> DiskError {
        match self.driver.fail(&mut self.xs, fault) {
            Ok(()) => DiskError::Closed(fault.node_text()),
            Err(error) => error.into(),
        }
    }

    /// Steps the driver while there are xenstore events. Events that arrived together with a
    /// response are handled too: none is left in the buffer when the caller sleeps on the
    /// connection.
    fn events(&mut self) -> Result<(), DiskError> {
        loop {
            let mut changed = false;
            while let Some(event) = self.xs.poll_event()? {
                changed |= event.token == self.driver.token();
            }
            if !changed {
                return Ok(());
            }
            if self.driver.step(&mut self.xs)? == Life::Gone {
                return Err(DiskError::Closed(String::from("the toolstack removed it")));
            }
        }
    }

    fn until_connected(&mut self) -> Result<(), DiskError> {
        let deadline = Instant::now() + self.patience;
        loop {
            self.events()?;
            if self.driver.class().is_connected() {
                return Ok(());
            }
            if self.driver.is_closing() {
                return Err(DiskError::Closed(self.reason()));
            }
            if Instant::now() >= deadline {
                return Err(self.no_backend());
            }
            self.sleep(Duration::from_millis(200))?;
        }
    }

    /// Returns the error text that the frontend or the backend wrote to xenstore.
    fn reason(&mut self) -> String {
        let Self { driver, xs, .. } = self;
        let ends = [Some(driver.token()), driver.backend_path()];
        let reason = ends.into_iter().flatten().find_map(|end| read_error(xs, end).ok().flatten());
        reason.unwrap_or_else(|| "by its backend".into())
    }

    fn no_backend(&mut self) -> DiskError {
        let backend = String::from(self.driver.backend_path().unwrap_or_default());
        DiskError::NoBackend {
            waited: self.patience,
            state: read_state(&mut self.xs, &backend).unwrap_or_default(),
            sector_size: read_sector_size(&mut self.xs, &backend).ok().flatten(),
            backend,
        }
    }

    /// Sleeps until the backend or xenstore signals an event, for at most `most`.
    fn sleep(&mut self, most: Duration) -> Result<(), DiskError> {
        let timeout =
            Timespec { tv_sec: most.as_secs() as i64, tv_nsec: most.subsec_nanos().into() };
        let channel = self.driver.class_mut().queue().map(|queue| queue.channel());
        let mut fds = Vec::with_capacity(2);
        fds.push(PollFd::new(&self.xs, PollFlags::IN));
        if let Some(channel) = &channel {
            fds.push(PollFd::new(*channel, PollFlags::IN));
        }
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(DiskError::Wait(error)),
        }
        if let Some(channel) = channel {
            // The notification is only cleared; the ring holds the actual events.
            let _ = channel.take();
        }
        Ok(())
    }
}
