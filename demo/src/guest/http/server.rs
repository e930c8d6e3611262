//! The event loop: all connections, the network interface, deadlines.

use super::connection::{Connection, is_crowded};
use super::gate::Gate;
use super::state::{ServerStatus, Shared};
use super::{CONNECTIONS, SOCKETS};
use crate::guest::fs::FsError;
use crate::guest::fs::thread::{FsResponse, FsThread, Reply};
use crossbeam_channel::Receiver;
use smoltcp::iface::{Config as InterfaceConfig, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::Device;
use smoltcp::socket::tcp;
use smoltcp::time::{Duration as StackDuration, Instant as StackInstant};
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, Ipv4Address, Ipv4Cidr};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// Receive buffer of a socket in bytes.
const RX_BUFFER: usize = 16 << 10;
/// Send buffer of a socket in bytes.
const TX_BUFFER: usize = 512 << 10;
/// Number of free connections below which none is kept alive.
const FEW: usize = CONNECTIONS / 4;
/// Token of the request for the mounted file system.
const INFO: u64 = u64::MAX;
/// Interval at which a device that accepts no frame is polled, if it gives no deadline.
const RETRY: Duration = Duration::from_millis(1);

/// The guest's network configuration.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// The NIC's address.
    pub mac: [u8; 6],
    /// The guest's address.
    pub address: Ipv4Address,
    /// Length of the network prefix in bits.
    pub prefix: u8,
    /// The default gateway.
    pub gateway: Option<Ipv4Address>,
    /// The port, usually 80.
    pub port: u16,
}

/// The HTTP server.
#[derive(Debug)]
pub struct Server {
    config: Config,
    shared: Shared,
    responses: Receiver<FsResponse>,
    server_status: ServerStatus,
    connections: Vec<Connection>,
    last_info_request: Instant,
}

impl Server {
    /// Returns a server for the files that `fs` reads.
    #[must_use]
    pub fn new(
        config: Config,
        fs: FsThread,
        responses: Receiver<FsResponse>,
        server_status: ServerStatus,
    ) -> Self {
        let connections = (0..SOCKETS).map(Connection::new).collect();
        let shared = Shared::new(fs);
        Self {
            config,
            shared,
            responses,
            server_status,
            connections,
            last_info_request: Instant::now(),
        }
    }

    /// Serves until `wait` breaks. `wait` sleeps until the device has work, the disk thread's waker
    /// is called, or the timeout expires, if there is one.
    pub fn run<D: Device>(
        &mut self,
        device: &mut D,
        mut wait: impl FnMut(&mut D, Option<Duration>) -> ControlFlow<()>,
    ) {
        let epoch = Instant::now();
        let stack_now = || {
            let micros = i64::try_from(epoch.elapsed().as_micros()).unwrap_or(i64::MAX);
            StackInstant::from_micros(micros)
        };
        let mut sockets = SocketSet::new(Vec::with_capacity(SOCKETS));
        let handles: Vec<SocketHandle> =
            self.connections.iter().map(|_| sockets.add(new_socket())).collect();
        let mut interface = self.interface(device, stack_now());
        if self.server_status.fs.is_none() {
            self.request_info();
        }
        // All sockets must listen before the first frame is processed, as it may be a SYN.
        self.step(&mut sockets, &handles);
        loop {
            let mut moved = self.take_responses();
            let listening = handles.iter().filter(|handle| {
                sockets.get::<tcp::Socket<'_>>(**handle).state() == tcp::State::Listen
            });
            let listening = listening.count();
            let mut gate = Gate { device: &mut *device, port: self.config.port, listening };
            moved |= interface.poll(stack_now(), &mut gate, &mut sockets) != PollResult::None;
            moved |= self.step(&mut sockets, &handles);
            if moved {
                // Continues without a sleep, but a stop request is noticed under load as well.
                if wait(device, Some(Duration::ZERO)).is_break() {
                    return;
                }
                continue;
            }
            let stack = interface.poll_delay(stack_now(), &sockets).map(to_std);
            // There was no progress, so a delay of zero means that the device is full.
            let stack = stack.map(|delay| delay.max(RETRY));
            let now = Instant::now();
            let crowded = is_crowded(self.busy());
            let own_deadline = self.connections.iter().filter_map(|c| c.deadline(crowded)).min();
            let own_deadline = own_deadline.map(|at| at.saturating_duration_since(now).max(RETRY));
            let delay = [stack, own_deadline].into_iter().flatten().min();
            if wait(device, delay).is_break() {
                return;
            }
        }
    }

    fn interface<D: Device>(&self, device: &mut D, now: StackInstant) -> Interface {
        let Config { mac, address, prefix, gateway, .. } = self.config;
        let mut config = InterfaceConfig::new(HardwareAddress::Ethernet(EthernetAddress(mac)));
        config.random_seed = rand::random();
        let mut interface = Interface::new(config, device, now);
        interface.update_ip_addrs(|addresses| {
            // The list is empty and has a capacity of at least one.
            let _ = addresses.push(IpCidr::Ipv4(Ipv4Cidr::new(address, prefix.min(32))));
        });
        if let Some(gateway) = gateway {
            let _ = interface.routes_mut().add_default_ipv4_route(gateway);
        }
        interface
    }

    /// Returns the number of connections with a client.
    fn busy(&self) -> usize {
        self.connections.iter().filter(|c| c.is_busy()).count()
    }

    fn request_info(&mut self) {
        self.last_info_request = Instant::now();
        if self.shared.fs.info(INFO).is_err() {
            self.server_status.fs = Some(Err(FsError::Gone));
        }
    }

    fn take_responses(&mut self) -> bool {
        let mut any = false;
        while let Ok(FsResponse { token, result }) = self.responses.try_recv() {
            any = true;
            if token == INFO {
                self.server_status.fs = match result {
                    Ok(Reply::Info(info)) => {
                        tracing::info!(kind = info.kind, label = %info.label, "file system mounted read-only");
                        Some(Ok(info))
                    }
                    Ok(_) => None,
                    Err(e) => Some(Err(e)),
                };
                continue;
            }
            match self.connections.get_mut((token & 0xff) as usize) {
                Some(connection) => connection.on_response(
                    token >> 8,
                    result,
                    &mut self.shared,
                    &self.server_status,
                    Instant::now(),
                ),
                None => self.shared.drop_reply(result),
            }
        }
        any
    }

    fn step(&mut self, sockets: &mut SocketSet<'_>, handles: &[SocketHandle]) -> bool {
        let now = Instant::now();
        let busy = self.busy();
        let few = CONNECTIONS.saturating_sub(busy) < FEW;
        self.shared.may_keep_alive = !few;
        if matches!(self.server_status.fs, Some(Err(_)))
            && now - self.last_info_request > Duration::from_secs(5)
        {
            self.request_info();
        }
        let mut moved = false;
        for (connection, handle) in self.connections.iter_mut().zip(handles) {
            let socket = sockets.get_mut::<tcp::Socket<'_>>(*handle);
            // All data was sent and acknowledged. With few free sockets, none is kept in TIME-WAIT.
            if few && socket.state() == tcp::State::TimeWait {
                socket.abort();
            }
            moved |= connection.step(socket, &mut self.shared, &self.server_status, busy, now)
                && socket.state() != tcp::State::Closed;
            // While there is a remote endpoint, a reset has not been sent yet. Without it, the
            // client would wait indefinitely for the rest of the response.
            let is_over =
                socket.state() == tcp::State::Closed && socket.remote_endpoint().is_none();
            if is_over && !connection.is_busy() {
                // Fails only for port 0, which the command line rejects.
                moved |= socket.listen(self.config.port).is_ok();
            }
        }
        if few {
            let longest = self.connections.iter_mut().zip(handles);
            if let Some((connection, handle)) = longest
                .filter(|(c, _)| c.idle(now).is_some_and(|idle| idle > Duration::from_millis(200)))
                .max_by_key(|(c, _)| c.idle(now))
            {
                connection.close_if_idle(sockets.get_mut(*handle), now);
                moved = true;
            }
        }
        moved
    }
}

fn new_socket() -> tcp::Socket<'static> {
    let buffer = |len| tcp::SocketBuffer::new(vec![0; len]);
    let mut socket = tcp::Socket::new(buffer(RX_BUFFER), buffer(TX_BUFFER));
    // Responses are written as a whole; Nagle's algorithm would only add a round trip.
    socket.set_nagle_enabled(false);
    socket.set_timeout(Some(StackDuration::from_secs(30)));
    socket
}

fn to_std(duration: StackDuration) -> Duration {
    Duration::from_micros(duration.total_micros())
}
