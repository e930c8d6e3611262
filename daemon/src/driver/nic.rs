//! The server of a NIC: a process of its own, or threads of this one.

use crate::process::nic::{NicPlan, RemoteNic};
use crate::process::supervised::Supervised;
use pvio_event_channel::DevicePlatform;
use pvio_netback::queue::Policy;
use pvio_netback::session::{Begin, Session, SessionSpec};
use pvio_netback::stats::Stats;
use pvio_netback::vif::{Attach, VifServer};
use pvio_ports::host::{LinkQueues, NicServer};
use pvio_recordfile::RecordFile;
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::common::DeviceAddr;
use pvio_xenbus::handshake::vif::{ToolstackBack, VifRate};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::task::Poll;

/// Serves a NIC in a process of its own if it can be, else by threads.
pub struct IsolatedNicServer<P> {
    thread: NicServer<P>,
    process: Option<RemoteNic<P>>,
    /// Why the NIC is served by threads although processes are configured.
    reason: Option<&'static str>,
    /// Whether the link has been opened, or is being opened: the decision is final.
    opened: bool,
}

/// A session of an [`IsolatedNicServer`].
pub enum NicSession<P>
where
    P: DevicePlatform<Channel: AsFd> + Send + Sync + 'static,
    P::Description: Serialize + DeserializeOwned,
{
    /// By threads.
    Thread(Box<Session<P, RecordFile, LinkQueues>>),
    /// In a process.
    Process(Box<Supervised<NicPlan<P>>>),
}

impl<P> IsolatedNicServer<P> {
    /// Creates a server.
    pub const fn new(thread: NicServer<P>, process: Option<RemoteNic<P>>) -> Self {
        Self { thread, process, reason: None, opened: false }
    }

    /// Returns the server by threads, if that is in use.
    #[must_use]
    pub fn thread(&self) -> Option<&NicServer<P>> {
        self.remote().is_none().then_some(&self.thread)
    }

    /// Returns the server by a process, if that is in use.
    #[must_use]
    pub fn remote(&self) -> Option<&RemoteNic<P>> {
        self.process.as_ref().filter(|_| self.reason.is_none())
    }

    /// Returns why the NIC is served by threads although processes are configured.
    #[must_use]
    pub const fn reason(&self) -> Option<&'static str> {
        self.reason
    }

    /// Decides where the NIC is served.
    fn decide(&mut self, vif: &ToolstackBack) -> Result<(), Fault> {
        let Some(process) = self.process.as_ref().filter(|_| !self.opened) else { return Ok(()) };
        self.reason = process.bound_to_process(vif)?;
        if let Some(reason) = self.reason {
            let nic = format!("vif{}.{}", vif.frontend_id, vif.handle);
            tracing::warn!(nic, reason, "the NIC is served by threads of the supervisor");
        }
        self.opened = true;
        Ok(())
    }
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

/// Calls a method of the server of a session.
macro_rules! serving {
    ($this:expr, $session:expr, ($server:ident, $of:ident) => $call:expr, $none:expr) => {
        match ($session, &mut $this.process) {
            (NicSession::Process($of), Some($server)) => $call,
            (NicSession::Process(_), None) => $none,
            (NicSession::Thread($of), _) => {
                let $server = &mut $this.thread;
                $call
            }
        }
    };
}

impl<P> VifServer for IsolatedNicServer<P>
where
    P: DevicePlatform<Channel: AsFd> + Send + Sync + 'static,
    P::Description: Serialize + DeserializeOwned,
{
    type Session = NicSession<P>;

    fn stats(&self) -> &[Arc<Stats>] {
        match self.remote() {
            Some(remote) => remote.stats(),
            None => self.thread.stats(),
        }
    }

    fn max_queues(&self) -> u32 {
        match self.remote() {
            Some(remote) => remote.max_queues(),
            None => self.thread.max_queues(),
        }
    }

    fn expect_queues(&mut self, queues: usize) {
        // The options of the NIC are not known yet.
        self.thread.expect_queues(queues);
        if let Some(process) = &mut self.process {
            process.expect_queues(queues);
        }
    }

    fn policy(&self) -> Policy {
        self.thread.policy()
    }

    fn open(&mut self, vif: &ToolstackBack, attach: Attach) -> Result<(), Fault> {
        self.decide(vif)?;
        server!(self, server => server.open(vif, attach))
    }

    fn poll_open(&mut self, vif: &ToolstackBack, attach: Attach) -> Result<Poll<()>, Fault> {
        self.decide(vif)?;
        server!(self, server => server.poll_open(vif, attach))
    }

    fn close(&mut self) -> Poll<()> {
        let closed = server!(self, server => server.close());
        self.opened &= closed.is_pending();
        closed
    }

    fn refresh(&mut self, vif: &ToolstackBack) -> Result<(), Fault> {
        server!(self, server => server.refresh(vif))
    }

    fn resumable(&mut self, spec: &SessionSpec) -> Result<(), Fault> {
        server!(self, server => server.resumable(spec))
    }

    fn start(&mut self, spec: &SessionSpec, begin: Begin) -> Result<Self::Session, Fault> {
        match self.process.as_mut().filter(|_| self.reason.is_none()) {
            Some(process) => Ok(NicSession::Process(Box::new(process.start(spec, begin)?))),
            None => Ok(NicSession::Thread(Box::new(self.thread.start(spec, begin)?))),
        }
    }

    fn ready(&mut self, session: &mut Self::Session) -> Result<Poll<()>, Fault> {
        serving!(self, session, (server, of) => server.ready(of), Ok(Poll::Pending))
    }

    fn fault(&mut self, session: &mut Self::Session) -> Option<Fault> {
        serving!(self, session, (server, of) => server.fault(of), None)
    }

    fn stop(&mut self, session: &mut Self::Session) -> Poll<()> {
        serving!(self, session, (server, of) => server.stop(of), Poll::Ready(()))
    }

    fn leave(&mut self, session: &mut Self::Session) -> Poll<()> {
        serving!(self, session, (server, of) => server.leave(of), Poll::Ready(()))
    }

    fn end(&mut self, device: DeviceAddr) {
        server!(self, server => server.end(device));
    }

    fn set_rate(&mut self, session: &mut Self::Session, rate: Option<VifRate>) {
        serving!(self, session, (server, of) => server.set_rate(of, rate), ());
    }

    fn filter_groups(&mut self, session: &mut Self::Session, chosen: bool) {
        serving!(self, session, (server, of) => server.filter_groups(of, chosen), ());
    }

    fn set_headroom(&mut self, session: &mut Self::Session, bytes: u16) {
        serving!(self, session, (server, of) => server.set_headroom(of, bytes), ());
    }
}
