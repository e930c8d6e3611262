//! The hypervisor's thread: accepts connections, reads requests, sends replies. It sleeps in `poll`
//! while there is no work.

use crate::machine::{Answer, ConnId, Machine, no};
use crate::pages::lock;
use crate::protocol::{MAX_LEN, Request, Scope, Status};
use crate::shared::{HypervisorEvent, Shared};
use crate::socket;
use pvio_grant_table::DomId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, accept_with, socketpair, sockopt};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
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

    /// Serves until it is stopped. Connections that ended are processed before requests: a process
    /// that takes over from one that was killed sends its request after that, and finds the
    /// ports and grants of the killed one released. Domains are not destroyed then: that would release pages that
    /// are still mapped.
    pub(crate) fn run(mut self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            let (woken, knocking, ready) = self.wait();
            if woken {
                let mut count = [0; 8];
                let _ = rustix::io::read(&self.shared.wake, &mut count);
                self.drop_destroyed();
            }
            if !ready.is_empty() {
                self.drop_hung_up();
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
        let mut bytes = [0; MAX_LEN];
        let outcome = match socket::recv(&connection.socket, &mut bytes, None) {
            Err(Errno::AGAIN) => return,
            Ok(got @ 1..) => {
                let bytes = bytes.get(..got).unwrap_or_default();
                connection.answer(&self.shared, bytes, self.next)
            }
            Ok(0) | Err(_) => None,
        };
        match outcome {
            Some(None) => {}
            Some(Some(device)) => {
                self.next += 1;
                self.connections.push(device);
            }
            None => {
                self.connections.remove(at);
                self.shared.hung_up(id);
            }
        }
    }

    /// Removes connections that their processes have closed.
    fn drop_hung_up(&mut self) {
        let fd = |c| PollFd::from_borrowed_fd(Connection::fd(c), PollFlags::empty());
        let mut fds: Vec<_> = self.connections.iter().map(fd).collect();
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if rustix::io::retry_on_intr(|| poll(&mut fds, Some(&now))).is_err() {
            // Without memory. Each of them is found again when it is read.
            return;
        }
        let ended = fds.iter().map(|fd| !fd.revents().is_empty());
        let ids: Vec<_> = self.connections.iter().map(|c| c.id).zip(ended).collect();
        for (id, _) in ids.into_iter().filter(|(_, ended)| *ended) {
            self.connections.retain(|c| c.id != id);
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
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Replies to a request. Returns `None` if the request is invalid or the reply cannot be sent,
    /// and the device connection that it created, which has number `next`.
    fn answer(&mut self, shared: &Shared, bytes: &[u8], next: ConnId) -> Option<Option<Self>> {
        let request = Request::from_wire(bytes).ok()?;
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
            (Request::Xenstore, Some(_)) if machine.is_device(self.id) => no(Status::Denied),
            (Request::Xenstore, Some(user)) => {
                // Under the lock, a connection is either created before its domain is destroyed,
                // and closed with it, or not created.
                match shared.names.connect(user) {
                    Ok(stream) => (Status::Done.into(), vec![Arc::new(stream.into())]),
                    Err(_) => no(Status::NoResources),
                }
            }
            (Request::Device(_), Some(_)) if machine.is_device(self.id) => no(Status::Denied),
            (Request::Device(scope), Some(user)) => {
                let made = Self::device(&mut machine, user, scope, next, self.pid);
                drop(machine);
                return match made {
                    Ok((device, theirs)) => {
                        let answer = (Status::Done.into(), vec![Arc::new(theirs)]);
                        // If that fails, the device connection is found closed.
                        self.send(&answer).then_some(Some(device))
                    }
                    Err(status) => self.send(&no(status)).then_some(None),
                };
            }
            (request, Some(_)) => machine.serve(self.id, request).ok()?,
            (_, None) => return None,
        };
        self.send(&answer).then_some(None)
    }

    /// Creates a device connection. Also returns the socket for its process.
    fn device(
        machine: &mut Machine,
        user: DomId,
        scope: Scope,
        id: ConnId,
        pid: i32,
    ) -> Result<(Self, OwnedFd), Status> {
        let flags = SocketFlags::CLOEXEC;
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let (socket, theirs) = pair.map_err(|_| Status::NoResources)?;
        rustix::io::ioctl_fionbio(&socket, true).map_err(|_| Status::NoResources)?;
        match machine.add_device(user, scope, id) {
            Status::Done => Ok((Self { id, socket, pid, joined: true }, theirs)),
            status => Err(status),
        }
    }

    fn send(&self, (reply, files): &Answer) -> bool {
        let fds: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
        socket::send(&self.socket, &reply.to_wire(), &fds).is_ok()
    }
}
