//! Access of the fuzz targets to the client's two halves, without its thread: the handshake, and the
//! requests of a connection.

use super::requests::{Lost, Requests};
use super::{Dial, Export, NbdError, NbdOptions};
use crate::engine::offload::{Executor, Job, Offload};
use crate::engine::{EngineError, Geometry};
use crate::image::spec::{NbdServer, NbdSpec};
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_ring::shm::HeapMemory;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

/// A server that is connected already.
struct Connected(Mutex<Option<UnixStream>>);

impl Dial for Connected {
    fn dial(&self, _: &NbdServer) -> io::Result<OwnedFd> {
        let socket = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        socket.map(OwnedFd::from).ok_or_else(|| io::ErrorKind::ConnectionRefused.into())
    }
}

/// Negotiates with a server whose bytes are in the socket already. Returns the export.
///
/// # Errors
/// Any [`NbdError`].
pub fn negotiate(server: UnixStream) -> Result<Export, NbdError> {
    let spec = NbdSpec { server: NbdServer::Unix("fuzz".into()), export: "e".into() };
    let options = NbdOptions { read_only: true, ..NbdOptions::default() };
    let dial = Connected(Mutex::new(Some(server)));
    super::negotiate(&spec, options, &dial).map(|(_, export)| export)
}

/// The requests of a connection, and the engine that makes them.
pub struct Client {
    /// The engine.
    pub engine: Offload<HeapMemory>,
    requests: Requests,
    export: Export,
    caught: Arc<Caught>,
}

#[derive(Default)]
struct Caught(Mutex<Vec<Job>>);

impl Executor for Caught {
    fn execute(&self, jobs: &mut dyn Iterator<Item = Job>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(jobs);
    }
}

impl Client {
    /// Creates a client of an export with these flags and this block size.
    ///
    /// # Panics
    /// If there are no more descriptors.
    #[must_use]
    pub fn new(size: u64, flags: u16, max_block: u32, structured: bool) -> Self {
        let export = Export { size, flags, min_block: 1, max_block, structured };
        let caught = Arc::new(Caught::default());
        let executor: Arc<dyn Executor> = caught.clone();
        let geometry = Geometry::new(size / 512);
        let engine = Offload::new(executor, geometry, 16, &Arc::default());
        let engine = engine.expect("a descriptor");
        Self { engine, requests: Requests::new(export), export, caught }
    }

    /// Takes over the jobs of the engine.
    pub fn take_jobs(&mut self) {
        let mut jobs = self.caught.0.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.drain(..).for_each(|job| self.requests.add(job));
    }

    /// Returns what is sent next, and marks it as sent.
    pub fn send(&mut self) -> Vec<u8> {
        let bytes = self.requests.outgoing().to_vec();
        self.requests.sent(bytes.len());
        bytes
    }

    /// Parses received bytes. Returns the number of bytes that are not parsed yet.
    ///
    /// # Errors
    /// The reason why the connection is lost.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<usize, &'static str> {
        self.requests.incoming(bytes).map(<[u8]>::len).map_err(|Lost(why)| why)
    }

    /// Starts over on a new connection.
    pub fn reconnect(&mut self) {
        self.requests.requeue(self.export);
    }

    /// Fails all requests.
    pub fn fail(&mut self) {
        self.requests.fail(EngineError::Os(5));
    }

    /// Whether no request waits for a reply.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty()
    }
}
