//! The server of a disk: a process of its own, or threads of this one.

use crate::process::disk::{DiskPlan, RemoteDisk};
use crate::process::supervised::Supervised;
use pvio_blkback::engine::Geometry;
use pvio_blkback::session::{Begin, Session, SessionIdentity, SessionSpec};
use pvio_blkback::vbd::{Opening, VbdServer};
use pvio_blkback::{Config, Stats};
use pvio_event_channel::DevicePlatform;
use pvio_recordfile::RecordFile;
use pvio_storage::host::{ImageQueues, ImageServer, definition};
use pvio_storage::image::{Disk, DiskOptions};
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::common::DeviceAddr;
use pvio_xenbus::handshake::vbd::ToolstackBack;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::task::Poll;

/// Serves a disk in a process of its own if it can be, else by threads.
pub struct DiskServer<P> {
    thread: ImageServer<P>,
    process: Option<RemoteDisk<P>>,
    /// Default options of disks.
    usual: DiskOptions,
    /// Why the disk is served by threads although processes are configured.
    reason: Option<&'static str>,
}

/// A session of a [`DiskServer`].
pub enum DiskSession<P>
where
    P: DevicePlatform<Channel: AsFd> + Send + Sync + 'static,
    P::Description: Serialize + DeserializeOwned,
{
    /// By threads.
    Thread(Box<Session<P, RecordFile, ImageQueues>>),
    /// In a process.
    Process(Box<Supervised<DiskPlan<P>>>),
}

impl<P> DiskServer<P> {
    /// Creates a server.
    pub const fn new(
        thread: ImageServer<P>,
        process: Option<RemoteDisk<P>>,
        usual: DiskOptions,
    ) -> Self {
        Self { thread, process, usual, reason: None }
    }

    /// Returns the server by threads, if that is in use.
    #[must_use]
    pub fn thread(&self) -> Option<&ImageServer<P>> {
        self.remote().is_none().then_some(&self.thread)
    }

    /// Returns the server by a process, if that is in use.
    #[must_use]
    pub fn remote(&self) -> Option<&RemoteDisk<P>> {
        self.process.as_ref().filter(|_| self.reason.is_none())
    }

    /// Returns why the disk is served by threads although processes are configured.
    #[must_use]
    pub const fn reason(&self) -> Option<&'static str> {
        self.reason
    }

    /// Decides where the disk is served.
    fn decide(&mut self, told: &ToolstackBack) -> Result<(), Fault> {
        if self.process.is_none() {
            return Ok(());
        }
        let disk = definition(told, &self.usual)?;
        let reason = shared(&disk);
        if let (Some(reason), None) = (reason, self.reason) {
            tracing::warn!(
                disk = told.dev,
                reason,
                "the disk is served by threads of the supervisor"
            );
        }
        self.reason = reason;
        Ok(())
    }
}

/// Returns what a disk shares with this process, so that it cannot be served by another one.
fn shared(disk: &Disk) -> Option<&'static str> {
    disk.options.group.as_ref().map(|_| "it shares the limits of a group")
}

/// Calls a method of the server in use.
macro_rules! server {
    ($this:expr, $server:ident => $call:expr) => {
        match $this.process.as_mut().filter(|_| $this.reason.is_none()) {
            Some($server) => $call,
            None => {
                let $server = &mut $this.thread;
                $call
            }
        }
    };
}

impl<P> VbdServer for DiskServer<P>
where
    P: DevicePlatform<Channel: AsFd> + Send + Sync + 'static,
    P::Description: Serialize + DeserializeOwned,
{
    type Session = DiskSession<P>;

    fn configure(&mut self, told: &ToolstackBack, usual: Config) -> Result<Config, Fault> {
        self.decide(told)?;
        server!(self, server => server.configure(told, usual))
    }

    fn open(&mut self, told: &ToolstackBack) -> Result<Geometry, Fault> {
        server!(self, server => server.open(told))
    }

    fn poll_open(&mut self, told: &ToolstackBack) -> Result<Opening, Fault> {
        // Other media may need another server; the previous session has stopped.
        let before = self.reason;
        self.decide(told)?;
        if before != self.reason {
            let other = match (&mut self.process, self.reason) {
                (Some(process), Some(_)) => process.close(),
                _ => self.thread.close(),
            };
            if other.is_pending() {
                self.reason = before;
                return Ok(Opening::Pending);
            }
        }
        server!(self, server => server.poll_open(told))
    }

    fn close(&mut self) -> Poll<()> {
        server!(self, server => server.close())
    }

    fn refresh(&mut self, told: &ToolstackBack) -> Result<(), Fault> {
        server!(self, server => server.refresh(told))
    }

    fn flush_failed(&self) -> bool {
        match self.remote() {
            Some(remote) => remote.flush_failed(),
            None => self.thread.flush_failed(),
        }
    }

    fn is_paused(&self) -> bool {
        match self.remote() {
            Some(remote) => remote.is_paused(),
            None => self.thread.is_paused(),
        }
    }

    fn look_up_size(&mut self) {
        server!(self, server => server.look_up_size());
    }

    fn sectors(&mut self) -> Option<u64> {
        server!(self, server => server.sectors())
    }

    fn stats(&self) -> &[Arc<Stats>] {
        match self.remote() {
            Some(remote) => remote.stats(),
            None => self.thread.stats(),
        }
    }

    fn resumable(&mut self, session: &SessionIdentity) -> Result<(), Fault> {
        // The disk's definition is not known yet.
        match &mut self.process {
            Some(process) => {
                process.resumable(session)?;
                self.thread.set_mapped_before(process.mapped_before());
                Ok(())
            }
            None => self.thread.resumable(session),
        }
    }

    fn start(&mut self, spec: &SessionSpec, begin: Begin) -> Result<Self::Session, Fault> {
        match self.process.as_mut().filter(|_| self.reason.is_none()) {
            Some(process) => Ok(DiskSession::Process(Box::new(process.start(spec, begin)?))),
            None => Ok(DiskSession::Thread(Box::new(self.thread.start(spec, begin)?))),
        }
    }

    fn ready(&mut self, session: &mut Self::Session) -> Result<Poll<()>, Fault> {
        match (session, &mut self.process) {
            (DiskSession::Process(session), Some(process)) => process.ready(session),
            (DiskSession::Process(_), None) => Ok(Poll::Pending),
            (DiskSession::Thread(session), _) => self.thread.ready(session),
        }
    }

    fn fault(&mut self, session: &mut Self::Session) -> Option<Fault> {
        match (session, &mut self.process) {
            (DiskSession::Process(session), Some(process)) => process.fault(session),
            (DiskSession::Process(_), None) => None,
            (DiskSession::Thread(session), _) => self.thread.fault(session),
        }
    }

    fn resize(&mut self, session: &mut Self::Session, sectors: u64) {
        match (session, &mut self.process) {
            (DiskSession::Process(session), Some(process)) => process.resize(session, sectors),
            (DiskSession::Process(_), None) => {}
            (DiskSession::Thread(session), _) => self.thread.resize(session, sectors),
        }
    }

    fn abandon(&mut self, session: &mut Self::Session) {
        match (session, &mut self.process) {
            (DiskSession::Process(session), Some(process)) => process.abandon(session),
            (DiskSession::Process(_), None) => {}
            (DiskSession::Thread(session), _) => self.thread.abandon(session),
        }
    }

    fn stop(&mut self, session: &mut Self::Session) -> Poll<()> {
        match (session, &mut self.process) {
            (DiskSession::Process(session), Some(process)) => process.stop(session),
            (DiskSession::Process(_), None) => Poll::Ready(()),
            (DiskSession::Thread(session), _) => self.thread.stop(session),
        }
    }

    fn leave(&mut self, session: &mut Self::Session) -> Poll<()> {
        match session {
            DiskSession::Process(session) => {
                session.leave();
                Poll::Ready(())
            }
            DiskSession::Thread(session) => self.thread.stop(session),
        }
    }

    fn end(&mut self, device: DeviceAddr) {
        server!(self, server => server.end(device));
    }
}
