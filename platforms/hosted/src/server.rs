//! The hypervisor's thread: accepts connections, reads requests, sends replies. It sleeps in `poll`
//! while there is no work.

use crate::machine::{Answer, ConnId};
use crate::pages::lock;
use crate::protocol::{LEN, Request, Status};
use crate::shared::{HypervisorEvent, Shared};
use crate::socket;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with, sockopt};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Limit of connections that have not joined as a domain. Beyond it, the oldest of them is closed.
const MAX_STRANGERS: usize = 64;

/// State of the thread.
pub(crate) struct Server {
    pub(crate) shared: Arc<Shared>,
    pub(crate) listener: OwnedFd,
    connections: Vec<Connection>,
    next: ConnId,
}

struct Connection {
    id: ConnId,
    socket: OwnedFd,
    pid: i32,
    joined: bool,
}

impl Server {
    pub(crate) fn new(shared: Arc<Shared>, listener: OwnedFd) -> Self {
        Self { shared, listener, connections: Vec::new(), next: 0 }
    }

    /// Serves until it is stopped. Domains are not destroyed then: that would release pages that
    /// are still mapped.
    pub(crate) fn run(mut self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            let (woken, knocking, ready) = self.wait();
            if woken {
                let mut count = [0; 8];
                let _ = rustix::io::read(&self.shared.wake, &mut count);
                self.drop_destroyed();
            }
            for id in ready {
                self.turn(id);
            }
            if knocking {
                self.accept();
            }
        }
    }

    /// Waits for the embedding process, a new connection, or a request. Returns which of them is
    /// ready.
    fn wait(&self) -> (bool, bool, Vec<ConnId>) {
        let mut fds = Vec::with_capacity(self.connections.len() + 2);
        fds.push(PollFd::new(&self.shared.wake, PollFlags::IN));
        fds.push(PollFd::new(&self.listener, PollFlags::IN));
        fds.extend(self.connections.iter().map(|c| PollFd::new(&c.socket, PollFlags::IN)));
        if let Err(why) = rustix::io::retry_on_intr(|| poll(&mut fds, None)) {
            // The only remaining error is a lack of kernel memory. It is temporary, so this sleeps
            // before the next attempt.
            debug_assert_eq!(why, Errno::NOMEM);
            std::thread::sleep(std::time::Duration::from_millis(100));
            return (false, false, Vec::new());
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        let (woken, knocking) = (ready.next() == Some(true), ready.next() == Some(true));
        let ids = self.connections.iter().zip(ready).filter(|(_, ready)| *ready);
        (woken, knocking, ids.map(|(connection, _)| connection.id).collect())
    }

    fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = match accept_with(&self.listener, flags) {
            Ok(socket) => socket,
            Err(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS) => {
                // The connection stays in the queue, and `poll` reports it again.
                std::thread::sleep(std::time::Duration::from_millis(100));
                return;
            }
            Err(_) => return,
        };
        let Ok(who) = sockopt::socket_peercred(&socket) else { return };
        if who.uid != rustix::process::getuid() {
            return;
        }
        let strangers = self.connections.iter().filter(|c| !c.joined).count();
        if strangers >= MAX_STRANGERS
            && let Some(oldest) = self.connections.iter().position(|c| !c.joined)
        {
            self.connections.remove(oldest);
        }
        let (id, pid) = (self.next, who.pid.as_raw_nonzero().get());
        self.next += 1;
        self.connections.push(Connection { id, socket, pid, joined: false });
    }

    /// Serves one request of one connection.
    fn turn(&mut self, id: ConnId) {
        let Some(at) = self.connections.iter().position(|c| c.id == id) else { return };
        let Some(connection) = self.connections.get_mut(at) else { return };
        let mut bytes = [0; LEN];
        let answered = match socket::recv(&connection.socket, &mut bytes, None) {
            Err(Errno::AGAIN) => return,
            Ok(got @ 1..) => connection.answer(&self.shared, bytes.get(..got).unwrap_or_default()),
            Ok(0) | Err(_) => false,
        };
        if !answered {
            self.connections.remove(at);
            self.shared.hung_up(id);
        }
    }

    /// Closes the connections of processes whose domain was destroyed.
    fn drop_destroyed(&mut self) {
        let machine = lock(&self.shared.machine);
        self.connections.retain(|c| !c.joined || machine.domain_of(c.id).is_some());
    }
}

impl Connection {
    /// Replies to a request. Returns `false` if the request is invalid or the reply cannot be sent.
    fn answer(&mut self, shared: &Shared, bytes: &[u8]) -> bool {
        let Ok(request) = Request::from_wire(bytes) else { return false };
        let mut machine = lock(&shared.machine);
        let answer = match (request, machine.domain_of(self.id)) {
            (Request::Join(domid), None) if !self.joined => {
                let answer = machine.join(domid, self.id, self.pid);
                drop(machine);
                if answer.0.status == Status::Done {
                    self.joined = true;
                    shared.tell(HypervisorEvent::Joined { domid });
                }
                answer
            }
            (Request::Xenstore, Some(user)) => {
                // Under the lock, a connection is either created before its domain is destroyed,
                // and closed with it, or not created.
                match shared.names.connect(user) {
                    Ok(stream) => (Status::Done.into(), vec![Arc::new(stream.into())]),
                    Err(_) => (Status::NoResources.into(), Vec::new()),
                }
            }
            (request, Some(user)) => match machine.serve(user, request) {
                Ok(answer) => {
                    drop(machine);
                    answer
                }
                Err(_) => return false,
            },
            (_, None) => return false,
        };
        self.send(&answer)
    }

    fn send(&self, (reply, files): &Answer) -> bool {
        let fds: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
        socket::send(&self.socket, &reply.to_wire(), &fds).is_ok()
    }
}
