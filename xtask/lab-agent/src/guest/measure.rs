//! Measurements by the guest's own clock.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use pvio_runtime::{PrivateBuf, Uring, whole};
use serde::Deserialize;
use serde_json::{Value, json};

use super::direct::{Buffer, Direct};
use super::read;
use crate::net;
use crate::pattern::Random;

/// Executes the requests of this module; returns `None` for other verbs.
pub fn obey(verb: &str, arguments: &Value) -> Option<Result<Value>> {
    let arguments = arguments.clone();
    Some(match verb {
        "measure-disk" => read(arguments).and_then(disk),
        "measure-blast" => read(arguments).and_then(blast),
        "measure-count" => read(arguments).and_then(|port: u16| count(port)),
        "measure-pour" => read(arguments).and_then(pour),
        "measure-drain" => read(arguments).and_then(|to: (String, u16)| drain(&to)),
        "measure-echo" => read(arguments).and_then(echo),
        _ => return None,
    })
}

#[derive(Clone, Deserialize)]
struct Disk {
    name: String,
    write: bool,
    /// Size of a request in bytes.
    size: usize,
    /// Number of requests in flight.
    depth: usize,
    requests: u64,
    /// Size in MiB of the part of the disk that is used.
    mib: u64,
}

/// Returns the seconds for random requests without the page cache.
fn disk(order: Disk) -> Result<Value> {
    let places = (order.mib << 20) / order.size as u64;
    ensure!(places > 0, "a request is longer than the disk");
    let seconds = if order.depth == 1 { one(&order, places)? } else { many(&order, places)? };
    Ok(json!(seconds))
}

fn one(order: &Disk, places: u64) -> Result<f64> {
    let disk = Direct::open(&order.name, order.write)?;
    let mut buffer = Buffer::new(order.size);
    let mut random = Random::new(1);
    let start = Instant::now();
    for _ in 0..order.requests {
        let offset = random.below(places) * order.size as u64;
        if order.write {
            disk.write(buffer.bytes(), offset)?;
        } else {
            disk.read(buffer.bytes(), offset)?;
        }
    }
    Ok(start.elapsed().as_secs_f64())
}

/// Uses io_uring, so that one thread has all requests in flight.
fn many(order: &Disk, places: u64) -> Result<f64> {
    const O_DIRECT: i32 = 0o40_000;
    let mut options = File::options();
    options.read(true).write(order.write).custom_flags(O_DIRECT);
    let file = options.open(format!("/dev/{}", order.name))?;
    let mut uring = Uring::new(u32::try_from(order.depth)?).context("io_uring")?;
    let file = uring.add_file(file.into());
    let mut free: Vec<_> = (0..order.depth).map(|_| PrivateBuf::page_aligned(order.size)).collect();
    let mut random = Random::new(1);
    let (mut begun, mut done) = (0, 0);
    let mut wrong = None;
    let start = Instant::now();
    while done < order.requests {
        while begun < order.requests
            && let Some(buffer) = free.pop()
        {
            let offset = random.below(places) * order.size as u64;
            let segments = [whole(buffer)];
            let begins = if order.write {
                uring.write(file, offset, segments, begun)
            } else {
                uring.read(file, offset, segments, begun)
            };
            begins.map_err(|_| anyhow!("more requests than slots"))?;
            begun += 1;
        }
        uring.wait(None)?;
        uring.reap(|request| {
            if request.result.map_or(0, |n| n as usize) != order.size {
                wrong = Some(request.result);
            }
            free.extend(request.segments.drain(..).map(|segment| segment.buf));
            done += 1;
        });
        ensure!(wrong.is_none(), "a request came to {wrong:?}");
    }
    Ok(start.elapsed().as_secs_f64())
}

#[derive(Deserialize)]
struct Blast {
    server: String,
    port: u16,
    size: usize,
    packets: u64,
}

fn blast(order: Blast) -> Result<Value> {
    net::blast((&order.server, order.port), order.size, order.packets).map(|()| Value::Null)
}

fn count(port: u16) -> Result<Value> {
    let (packets, seconds) = net::count(port)?;
    Ok(json!({ "packets": packets, "seconds": seconds }))
}

#[derive(Deserialize)]
struct Pour {
    server: String,
    port: u16,
    bytes: u64,
}

/// Sends bytes of any value; the receiver measures the time.
fn pour(order: Pour) -> Result<Value> {
    let mut stream = TcpStream::connect((order.server.as_str(), order.port))?;
    let piece = vec![0x5a; 64 << 10];
    for _ in 0..order.bytes / piece.len() as u64 {
        stream.write_all(&piece)?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    // The receiver closes the connection when it has everything.
    stream.read_to_end(&mut Vec::new())?;
    Ok(Value::Null)
}

/// Connects and receives; returns the number of bytes and the seconds.
fn drain(to: &(String, u16)) -> Result<Value> {
    let stream = TcpStream::connect((to.0.as_str(), to.1))?;
    let (bytes, seconds) = net::swallow(stream)?;
    Ok(json!({ "bytes": bytes, "seconds": seconds }))
}

#[derive(Deserialize)]
struct Echo {
    server: String,
    size: usize,
    rounds: u64,
}

/// Returns the seconds for sequential round trips of datagrams.
fn echo(order: Echo) -> Result<Value> {
    let socket = net::client(&order.server)?;
    let start = Instant::now();
    for round in 0..order.rounds {
        net::echo(&socket, order.size, round)?;
    }
    Ok(json!(start.elapsed().as_secs_f64()))
}
