//! An HTTP server of a few files for firmware to load, which records the requests.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// A running server, stopped when dropped.
pub struct Server {
    shared: Arc<Shared>,
    address: String,
    secret: String,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    files: Mutex<BTreeMap<String, Vec<u8>>>,
    requests: Mutex<Vec<String>>,
    stop: AtomicBool,
}

/// Starts a server at an address of dom0.
///
/// # Errors
/// The address is in use.
pub fn serve(address: &str) -> Result<Server> {
    let listener = TcpListener::bind(address).with_context(|| address.to_owned())?;
    let secret = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().to_owned();
    let shared: Arc<Shared> = Arc::default();
    let served = Arc::clone(&shared);
    let thread = thread::spawn(move || {
        for client in listener.incoming() {
            if served.stop.load(Ordering::Relaxed) {
                break;
            }
            // A client that is disconnected sends its request again.
            let _ = client.map(|client| answer(&served, &client));
        }
    });
    Ok(Server { shared, address: address.to_owned(), secret, thread: Some(thread) })
}

impl Server {
    /// Returns a random token, known only to clients that have received it.
    pub fn secret(&self) -> &str {
        &self.secret
    }

    /// Serves these bytes at this path.
    pub fn offer(&self, path: &str, bytes: Vec<u8>) {
        lock(&self.shared.files).insert(path.to_owned(), bytes);
    }

    /// Returns the requested paths, in order.
    pub fn requests(&self) -> Vec<String> {
        lock(&self.shared.requests).clone()
    }

    /// Waits until a path has been requested; returns false on a timeout.
    pub fn wait_for(&self, path: &str, patience: Duration) -> bool {
        let start = Instant::now();
        while start.elapsed() < patience {
            if self.requests().iter().any(|it| it == path) {
                return true;
            }
            thread::sleep(Duration::from_millis(200));
        }
        false
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Ends the thread's `accept`.
        drop(TcpStream::connect(&self.address));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn answer(shared: &Shared, client: &TcpStream) -> Result<()> {
    client.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut lines = BufReader::new(client).lines();
    let request = lines.next().context("a request")??;
    while !lines.next().context("the end of the head")??.is_empty() {}
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let file = lock(&shared.files).get(&path).cloned();
    lock(&shared.requests).push(path);
    let (status, body) = file.map_or(("404 Not Found", Vec::new()), |body| ("200 OK", body));
    let head =
        format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    let mut out = client;
    out.write_all(head.as_bytes())?;
    out.write_all(&body).context("the body")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
