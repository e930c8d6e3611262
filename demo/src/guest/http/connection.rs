//! One connection, from listening to closed; its socket is then used for the next one.

use super::live;
use super::request::{self, Request};
use super::response::status_of;
use super::sending::{Sending, found, page, refusal};
use super::state::{ServerStatus, Shared};
use super::{
    CONNECTIONS, CROWDED_HEAD_TIME, CROWDED_LINGER, DISK_TIME, HEAD_TIME, IDLE, LINGER, MAX_HEAD,
    STALL,
};
use crate::guest::fs::FsError;
use crate::guest::fs::thread::Reply;
use pvio_runtime::LogLimit;
use smoltcp::socket::tcp;
use std::time::{Duration, Instant};

/// One connection.
#[derive(Debug)]
pub struct Connection {
    /// Index of the connection, part of the token of its requests to the disk thread.
    index: u64,
    /// Distinguishes replies for the current response from those for an aborted one.
    serial: u64,
    state: State,
    input: Vec<u8>,
    /// Time of the last progress.
    since: Instant,
}

/// Returns whether connections without progress have to be closed early because other clients wait.
#[must_use]
pub const fn is_crowded(connections: usize) -> bool {
    connections >= CONNECTIONS
}

#[derive(Debug)]
enum State {
    Listening,
    /// Waiting for a request, or for the rest of one.
    Head,
    /// The disk thread has been sent the request's path.
    WaitingForDisk(Box<Request>, Instant),
    Sending(Sending),
    /// Our side is closed; further data is discarded.
    Closing,
}

impl Connection {
    /// Returns a connection that waits for a client.
    #[must_use]
    pub fn new(index: usize) -> Self {
        let (index, since) = (index as u64, Instant::now());
        Self { index, serial: 0, state: State::Listening, input: Vec::new(), since }
    }

    /// Returns whether a client is connected.
    #[must_use]
    pub const fn is_busy(&self) -> bool {
        !matches!(self.state, State::Listening)
    }

    /// Returns how long the connection has been idle; `None` while it has a request.
    #[must_use]
    pub fn idle(&self, now: Instant) -> Option<Duration> {
        let idle = matches!(self.state, State::Head) && self.input.is_empty();
        idle.then(|| now.saturating_duration_since(self.since))
    }

    /// Returns the timeout of the current state; it is shorter if other clients wait for a
    /// connection.
    #[must_use]
    pub fn deadline(&self, crowded: bool) -> Option<Instant> {
        let time = match &self.state {
            State::Listening => return None,
            State::Head if crowded => CROWDED_HEAD_TIME,
            State::Head if self.input.is_empty() => IDLE,
            State::Head => HEAD_TIME,
            State::Closing if crowded => CROWDED_LINGER,
            State::WaitingForDisk(..) => DISK_TIME,
            State::Sending(_) => STALL,
            State::Closing => LINGER,
        };
        Some(self.since + time)
    }

    /// Closes the connection if it is idle.
    pub fn close_if_idle(&mut self, socket: &mut tcp::Socket<'_>, now: Instant) {
        if self.idle(now).is_some() {
            self.close(socket, now);
        }
    }

    /// Does all work that is possible now; returns whether there was progress.
    pub fn step(
        &mut self,
        socket: &mut tcp::Socket<'_>,
        shared: &mut Shared,
        server_status: &ServerStatus,
        connections: usize,
        now: Instant,
    ) -> bool {
        match socket.state() {
            tcp::State::Closed => return self.forget(shared),
            tcp::State::Listen | tcp::State::SynReceived => return false,
            _ => {}
        }
        if matches!(self.state, State::Listening) {
            (self.state, self.since) = (State::Head, now);
        }
        if self.deadline(is_crowded(connections)).is_some_and(|at| now >= at) {
            return self.time_out(socket, shared, now);
        }
        let mut moved = false;
        // A client with many pipelined requests is served several of them per turn, but not all.
        for _ in 0..8 {
            let before = moved;
            moved |= self.read(socket, now);
            match &mut self.state {
                State::Head => {
                    let before = self.input.len();
                    if self.take_request(shared, server_status, connections, now) {
                        moved = true;
                        continue;
                    }
                    if before == 0 && !socket.may_recv() {
                        self.close(socket, now);
                        return true;
                    }
                    if !socket.may_recv() {
                        self.state = State::Closing;
                        socket.close();
                        return true;
                    }
                }
                State::Sending(_) => {
                    if self.send(socket, shared, server_status, now) {
                        moved = true;
                        continue;
                    }
                }
                State::Listening | State::WaitingForDisk(..) | State::Closing => {}
            }
            if moved == before {
                break;
            }
        }
        moved
    }

    /// Handles a reply of the disk thread; discards it if it belongs to an aborted response.
    pub fn on_response(
        &mut self,
        serial: u64,
        result: Result<Reply, FsError>,
        shared: &mut Shared,
        server_status: &ServerStatus,
        now: Instant,
    ) {
        if serial != self.serial {
            return shared.drop_reply(result);
        }
        match (&mut self.state, result) {
            (State::WaitingForDisk(..), result) => {
                let State::WaitingForDisk(request, start) =
                    std::mem::replace(&mut self.state, State::Head)
                else {
                    return;
                };
                let sending = match result {
                    Ok(Reply::Visited(target)) => {
                        found(&request, target, start, shared, server_status)
                    }
                    Ok(_) => {
                        refusal(&request, 500, "the disk thread sent an unexpected response", start)
                    }
                    Err(e) if request.path == b"/" => {
                        let body = live::page(server_status, Err(&e));
                        page(&request, body, "text/html; charset=utf-8", start)
                    }
                    Err(e) => {
                        let (status, why) = status_of(&e);
                        if status >= 500 {
                            server_status.http.count_error();
                        }
                        refusal(&request, status, &why, start)
                    }
                };
                (self.state, self.since) = (State::Sending(sending), now);
            }
            (State::Sending(Sending { file: Some(file), .. }), Ok(Reply::Read(bytes))) => {
                file.in_flight -= 1;
                if bytes.is_empty() {
                    // The file is shorter than when it was opened, so `Content-Length` cannot be
                    // fulfilled.
                    self.give_up(shared, server_status);
                } else {
                    file.ready.push_back(bytes);
                }
            }
            (State::Sending(_), Err(e)) => {
                static CUT_OFF: LogLimit = LogLimit::new();
                if let Some(unlogged) = CUT_OFF.admit() {
                    tracing::warn!(code = e.code(), error = %e, unlogged, "the response was aborted");
                }
                self.give_up(shared, server_status);
            }
            (_, result) => shared.drop_reply(result),
        }
    }

    /// Aborts a response that cannot be completed. The next step resets the connection, so
    /// that the client detects it.
    fn give_up(&mut self, shared: &mut Shared, server_status: &ServerStatus) {
        server_status.http.count_error();
        if let State::Sending(sending) = &mut self.state {
            sending.close_file(shared);
        }
        self.serial += 1;
        self.state = State::Closing;
        self.since = Instant::now().checked_sub(LINGER).unwrap_or(self.since);
    }

    fn token(&self) -> u64 {
        self.serial << 8 | self.index
    }

    fn forget(&mut self, shared: &mut Shared) -> bool {
        if let State::Sending(sending) = &mut self.state {
            sending.close_file(shared);
        }
        self.serial += 1;
        self.state = State::Listening;
        self.input = Vec::new();
        true
    }

    fn close(&mut self, socket: &mut tcp::Socket<'_>, now: Instant) {
        socket.close();
        (self.state, self.since) = (State::Closing, now);
    }

    fn time_out(
        &mut self,
        socket: &mut tcp::Socket<'_>,
        shared: &mut Shared,
        now: Instant,
    ) -> bool {
        let late = |status, why: &str| {
            let request = Request::default();
            Sending { keep_alive: false, ..refusal(&request, status, why, now) }
        };
        let sending = match &self.state {
            State::Head if !self.input.is_empty() => {
                late(408, "the request was not complete in time")
            }
            State::WaitingForDisk(..) => late(
                503,
                "the disk does not respond; its driver domain may be restarting, so try again later",
            ),
            State::Head => {
                self.close(socket, now);
                return true;
            }
            _ => {
                socket.abort();
                return self.forget(shared);
            }
        };
        self.serial += 1;
        self.input.clear();
        (self.state, self.since) = (State::Sending(sending), now);
        true
    }

    /// Reads from the socket, up to the maximum size of a head. While a response is being sent,
    /// further requests stay in the socket.
    fn read(&mut self, socket: &mut tcp::Socket<'_>, now: Instant) -> bool {
        if !socket.can_recv() {
            return false;
        }
        match self.state {
            State::Closing => socket.recv(|bytes| (bytes.len(), true)).unwrap_or(false),
            State::Head => {
                let room = MAX_HEAD.saturating_sub(self.input.len());
                if self.input.is_empty() {
                    self.since = now;
                }
                let input = &mut self.input;
                let take = |bytes: &mut [u8]| {
                    let len = bytes.len().min(room);
                    input.extend_from_slice(&bytes[..len]);
                    (len, len > 0)
                };
                socket.recv(take).unwrap_or(false)
            }
            _ => false,
        }
    }

    /// Parses a request and starts its response, if the request is complete.
    fn take_request(
        &mut self,
        shared: &mut Shared,
        server_status: &ServerStatus,
        connections: usize,
        now: Instant,
    ) -> bool {
        if self.input.is_empty() {
            return false;
        }
        let (mut request, len) = match request::parse(&self.input) {
            Ok(None) => return false,
            Ok(Some(parsed)) => parsed,
            Err(refused) => {
                // After a malformed request, the start of the next one is unknown.
                let request = Request::default();
                let sending = refusal(&request, refused.status, refused.why, now);
                self.input.clear();
                (self.state, self.since) = (State::Sending(sending), now);
                return true;
            }
        };
        self.input.drain(..len);
        // With few free connections, none is kept alive.
        request.keep_alive &= shared.may_keep_alive;
        self.since = now;
        let json = "application/json";
        let own = match request.path.as_slice() {
            b"/.pvio/status.json" => Some((live::status(server_status, connections), json)),
            b"/.pvio/metrics" => Some((
                live::metrics(server_status, connections),
                "text/plain; version=0.0.4; charset=utf-8",
            )),
            path if path.starts_with(b"/.pvio/") => {
                let sending =
                    refusal(&request, 404, "there is /.pvio/status.json and /.pvio/metrics", now);
                self.state = State::Sending(sending);
                return true;
            }
            _ => None,
        };
        if let Some((body, mime)) = own {
            self.state = State::Sending(page(&request, body, mime, now));
            return true;
        }
        self.serial += 1;
        let index =
            request.path.len() > 1 && request.path.ends_with(b"/") && request.query != "list";
        let asked = shared.fs.visit(self.token(), request.path.clone(), index);
        self.state = match asked {
            Ok(()) => State::WaitingForDisk(Box::new(request), now),
            Err(e) => State::Sending(refusal(&request, 503, &e.to_string(), now)),
        };
        true
    }

    fn send(
        &mut self,
        socket: &mut tcp::Socket<'_>,
        shared: &mut Shared,
        server_status: &ServerStatus,
        now: Instant,
    ) -> bool {
        let token = self.token();
        let State::Sending(sending) = &mut self.state else { return false };
        if !socket.may_send() {
            socket.abort();
            return self.forget(shared);
        }
        let mut moved = false;
        if sending.sent < sending.bytes.len() {
            let sent = socket.send_slice(&sending.bytes[sending.sent..]).unwrap_or(0);
            sending.sent += sent;
            moved |= sent > 0;
        }
        if sending.sent == sending.bytes.len()
            && let Some(file) = &mut sending.file
        {
            moved |= file.send(socket, shared);
        }
        if let Some(file) = &mut sending.file {
            match file.ask(token, shared) {
                Ok(asked) => moved |= asked,
                Err(_) => {
                    self.give_up(shared, server_status);
                    return true;
                }
            }
        }
        if moved {
            self.since = now;
        }
        let done = sending.sent == sending.bytes.len()
            && sending.file.as_ref().is_none_or(|file| file.is_finished());
        if !done {
            return moved;
        }
        server_status.http.count(sending.total, sending.start.elapsed());
        sending.close_file(shared);
        self.since = now;
        if sending.keep_alive {
            self.state = State::Head;
        } else {
            self.close(socket, now);
        }
        true
    }
}
