//! The server's thread: wait, receive, execute, send.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;
use std::vec::Vec;

use pvio_ring::DomId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::listen::Listener;
use super::peer::{Disconnected, Peer};
use super::{Command, MAX_DOMAIN_CONNECTIONS, MAX_SOCKET_CONNECTIONS};
use crate::id::ConnId;
use crate::store::Store;

/// Number of connections accepted in one turn.
const ACCEPTS_A_TURN: usize = 16;
/// Time for which the listening socket is not polled after the process ran out of descriptors: it
/// stays readable, so polling it would be a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub(super) struct Service {
    store: Store,
    listener: Option<Listener>,
    wake: Arc<OwnedFd>,
    inbox: Receiver<Command>,
    peers: BTreeMap<ConnId, Peer>,
    pause_accepting: bool,
    domain_connections: usize,
}

/// Result of a wait.
#[derive(Default)]
struct Ready {
    commands: bool,
    accept: bool,
    peers: Vec<(ConnId, PollFlags)>,
}

impl Service {
    pub fn new(
        store: Store,
        listener: Option<Listener>,
        wake: Arc<OwnedFd>,
        inbox: Receiver<Command>,
    ) -> Self {
        let (peers, domain_connections) = (BTreeMap::new(), MAX_DOMAIN_CONNECTIONS);
        Self { store, listener, wake, inbox, peers, pause_accepting: false, domain_connections }
    }

    pub fn domain_connections(self, most: usize) -> Self {
        Self { domain_connections: most, ..self }
    }

    pub fn run(mut self) {
        let mut more = false;
        loop {
            // If `poll` fails (no memory), neither retry immediately nor exit.
            let Some(ready) = self.wait(more) else {
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            };
            if ready.commands && !self.execute_commands() {
                return;
            }
            if ready.accept {
                self.accept();
            }
            more = self.serve(&ready.peers);
        }
    }

    /// Waits until there is work; returns immediately if there already is some.
    fn wait(&mut self, more: bool) -> Option<Ready> {
        let timeout = match (more, self.pause_accepting) {
            (true, _) => Some(Duration::ZERO),
            (false, true) => Some(ACCEPT_PAUSE),
            (false, false) => None,
        };
        let accepting = !self.pause_accepting && self.socket_connections() < MAX_SOCKET_CONNECTIONS;
        self.pause_accepting = false;
        let listener = self.listener.as_ref().filter(|_| accepting);

        let mut fds = Vec::with_capacity(self.peers.len().saturating_add(2));
        fds.push(PollFd::new(&*self.wake, PollFlags::IN));
        fds.extend(self.peers.values().map(|p| PollFd::new(p, p.interest())));
        fds.extend(listener.map(|l| PollFd::new(l, PollFlags::IN)));
        let spec = timeout.and_then(|t| Timespec::try_from(t).ok());
        match poll(&mut fds, spec.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Some(Ready::default()),
            Err(_) => return None,
        }

        let mut flags = fds.iter().map(PollFd::revents);
        let commands = flags.next().is_some_and(|f| !f.is_empty());
        let peers = self.peers.keys().copied().zip(flags.by_ref()).collect();
        let accept = listener.is_some() && flags.next().is_some_and(|f| !f.is_empty());
        Some(Ready { commands, accept, peers })
    }

    /// Executes the owner's commands; returns `false` if the thread has to exit.
    fn execute_commands(&mut self) -> bool {
        let mut counter = [0_u8; 8];
        let _ = rustix::io::read(&*self.wake, &mut counter);
        while let Ok(command) = self.inbox.try_recv() {
            // The caller may no longer wait for the result; that is not an error here.
            match command {
                Command::Shutdown => return false,
                Command::Connect { domid, stream, done } => {
                    let _ = done.send(self.connect(domid, stream));
                }
                Command::Introduce { domid, done } => {
                    let _ = done.send(self.store.introduce(domid));
                }
                Command::Release { domid, done } => {
                    let released = self.store.release(domid);
                    self.close_dropped();
                    let _ = done.send(released);
                }
                Command::Check { done } => {
                    let _ = done.send(self.store.check());
                }
            }
        }
        true
    }

    fn connect(&mut self, domid: DomId, stream: UnixStream) -> std::io::Result<()> {
        if domid != DomId::DOM0 && self.store.connections_of(domid) >= self.domain_connections {
            return Err(std::io::ErrorKind::QuotaExceeded.into());
        }
        stream.set_nonblocking(true)?;
        let conn = self.store.connect(domid);
        self.peers.insert(conn, Peer::new(stream, false));
        Ok(())
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPTS_A_TURN {
            if self.socket_connections() >= MAX_SOCKET_CONNECTIONS {
                return;
            }
            match self.listener.as_ref().map(Listener::accept) {
                Some(Ok(Some(stream))) => {
                    let conn = self.store.connect(DomId::DOM0);
                    self.peers.insert(conn, Peer::new(stream, true));
                }
                Some(Err(_)) => {
                    self.pause_accepting = true;
                    return;
                }
                _ => return,
            }
        }
    }

    /// Serves every connection for one turn; returns whether work is left that can be done now.
    fn serve(&mut self, ready: &[(ConnId, PollFlags)]) -> bool {
        let readable = PollFlags::IN | PollFlags::HUP | PollFlags::ERR;
        let mut disconnected = Vec::new();
        for (conn, flags) in ready {
            if let Some(peer) = self.peers.get_mut(conn)
                && flags.intersects(readable)
                && peer.receive() == Err(Disconnected)
            {
                disconnected.push(*conn);
            }
        }
        let mut more = false;
        let all: Vec<ConnId> = self.peers.keys().copied().collect();
        for conn in &all {
            // A request may have released the domain of a connection that was not served yet.
            let Some(peer) = self.peers.get_mut(conn) else {
                continue;
            };
            match peer.work(*conn, &mut self.store) {
                Ok(left) => more |= left,
                Err(Disconnected) => disconnected.push(*conn),
            }
            self.close_dropped();
        }
        for conn in &all {
            if let Some(peer) = self.peers.get_mut(conn)
                && peer.flush(*conn, &mut self.store) == Err(Disconnected)
            {
                disconnected.push(*conn);
            }
        }
        for conn in disconnected {
            self.store.disconnect(conn);
            self.peers.remove(&conn);
        }
        // Sending may have made room for requests that are already in the buffer.
        more || self.peers.iter().any(|(conn, peer)| peer.could_work(*conn, &self.store))
    }

    fn close_dropped(&mut self) {
        for conn in self.store.take_dropped() {
            self.peers.remove(&conn);
        }
    }

    fn socket_connections(&self) -> usize {
        self.peers.values().filter(|p| p.from_socket).count()
    }
}
