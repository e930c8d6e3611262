//! Background I/O during other requests; each thread verifies the data that it reads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::direct::{Buffer, Direct};
use crate::net;
use crate::pattern::{self, Random};

/// The running load.
#[derive(Default)]
pub struct Load {
    stop: Arc<AtomicBool>,
    rounds: Vec<Arc<AtomicU64>>,
    threads: Vec<JoinHandle<Result<()>>>,
}

/// Configuration of a load.
#[derive(Deserialize)]
pub struct Order {
    /// Disks to write and read.
    #[serde(default)]
    disks: Vec<String>,
    /// Addresses of echo servers for datagrams.
    #[serde(default)]
    echoes: Vec<String>,
    /// Whether echoes may be lost, for example while a device is removed.
    #[serde(default)]
    lossy: bool,
    /// Pause after each round in milliseconds, to leave processor time to others.
    #[serde(default)]
    rest: u64,
}

impl Load {
    /// Starts the load, and waits until each thread has completed its first round.
    pub fn start(&mut self, order: Order) -> Result<Value> {
        ensure!(self.threads.is_empty(), "a load is on already");
        self.stop = Arc::default();
        let rest = Duration::from_millis(order.rest);
        for disk in order.disks {
            self.spawn(move |stop, rounds| scribble(&disk, rest, stop, rounds));
        }
        for echo in order.echoes {
            self.spawn(move |stop, rounds| chat(&echo, order.lossy, rest, stop, rounds));
        }
        while self.rounds.iter().any(|rounds| rounds.load(Ordering::Relaxed) == 0) {
            if self.threads.iter().any(JoinHandle::is_finished) {
                return self.stop();
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(Value::Null)
    }

    /// Stops the load; returns the number of rounds of each thread.
    pub fn stop(&mut self) -> Result<Value> {
        self.stop.store(true, Ordering::Relaxed);
        let rounds: Vec<_> = self.rounds.drain(..).map(|it| it.load(Ordering::Relaxed)).collect();
        for thread in self.threads.drain(..) {
            thread.join().map_err(|_| anyhow!("a load panicked"))??;
        }
        Ok(json!(rounds))
    }

    fn spawn(&mut self, work: impl Fn(&AtomicBool, &AtomicU64) -> Result<()> + Send + 'static) {
        let (stop, rounds) = (Arc::clone(&self.stop), Arc::<AtomicU64>::default());
        self.rounds.push(Arc::clone(&rounds));
        self.threads.push(thread::spawn(move || work(&stop, &rounds)));
    }
}

/// Writes to a random place in the second half of a disk and reads it back.
fn scribble(name: &str, rest: Duration, stop: &AtomicBool, rounds: &AtomicU64) -> Result<()> {
    let disk = Direct::open(name, true)?;
    let size: u64 = std::fs::read_to_string(format!("/sys/block/{name}/size"))?.trim().parse()?;
    let (half, blocks) = (size / 2 * 512, size / 2 / 128);
    let mut buffer = Buffer::new(64 << 10);
    let mut random = Random::new(1);
    while !stop.load(Ordering::Relaxed) {
        let round = rounds.load(Ordering::Relaxed);
        let offset = half + random.below(blocks) * (64 << 10);
        let len = usize::try_from((random.below(128) + 1) * 512)?;
        let piece = &mut buffer.bytes()[..len];
        pattern::fill(piece, round, offset);
        disk.write(piece, offset)?;
        piece.fill(0);
        disk.read(piece, offset)?;
        let wrong = pattern::mismatch(piece, round, offset);
        ensure!(wrong.is_none(), "{name}: byte {wrong:?} at {offset} came back as another");
        rounds.fetch_add(1, Ordering::Relaxed);
        thread::sleep(rest);
    }
    Ok(())
}

/// Sends datagrams to an echo server and compares the echoes.
fn chat(
    server: &str,
    lossy: bool,
    rest: Duration,
    stop: &AtomicBool,
    rounds: &AtomicU64,
) -> Result<()> {
    let socket = net::client(server)?;
    let mut random = Random::new(2);
    while !stop.load(Ordering::Relaxed) {
        let size = usize::try_from(random.below(1400) + 8)?;
        match net::echo(&socket, size, rounds.load(Ordering::Relaxed)) {
            Ok(()) => _ = rounds.fetch_add(1, Ordering::Relaxed),
            Err(_) if lossy => thread::sleep(Duration::from_millis(20)),
            Err(error) => return Err(error),
        }
        thread::sleep(rest);
    }
    Ok(())
}
