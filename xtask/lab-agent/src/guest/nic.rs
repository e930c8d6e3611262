//! Addresses and traffic.

use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::sync::Mutex;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::read;
use crate::net::datagrams::{self, Flood, Flow, Group, Taker};
use crate::net::{self, counters};
use crate::sys;

const QUICK: Duration = Duration::from_secs(20);

/// Executes the requests of this module; returns `None` for other verbs.
pub fn obey(verb: &str, arguments: &Value) -> Option<Result<Value>> {
    let arguments = arguments.clone();
    Some(match verb {
        "nic-up" => read(arguments).and_then(up),
        "nic-gone" => read(arguments).and_then(|name: String| gone(&name)),
        "nic-echo" => read(arguments).and_then(echo),
        "nic-answered" => read(arguments).and_then(answered),
        "tcp-send" => read(arguments).and_then(send),
        "tcp-receive" => read(arguments).and_then(receive),
        "echo-serve" => net::serve_echo().map(|()| Value::Null),
        "echo-at" => read(arguments).and_then(|address: String| echo_at(&address)),
        "nic-counter" => read(arguments).and_then(|(name, counter): (String, String)| {
            counters::interface(&name, &counter).map(|n| json!(n))
        }),
        "protocol-counter" => read(arguments).and_then(|(name, counter): (String, String)| {
            counters::protocol(&name, &counter).map(|n| json!(n))
        }),
        "nic-interrupts" => read(arguments)
            .and_then(|name: String| counters::interrupts(&name).map(|them| json!(them))),
        "datagrams-send" => {
            read(arguments).and_then(|order| datagrams::send(&order).map(|()| Value::Null))
        }
        "datagrams-start" => read(arguments).and_then(take_start),
        "datagrams-end" => take_end(),
        "flood-start" => read(arguments).and_then(flood_start),
        "flood-end" => flood_end(),
        "tcp-serve" => read(arguments).and_then(serve),
        "tcp-served" => served(),
        "tcp-stream" => read(arguments).map(stream),
        _ => return None,
    })
}

#[derive(Deserialize)]
struct Up {
    name: String,
    address: String,
}

/// Waits for an interface, sets its address, waits for its carrier.
fn up(order: Up) -> Result<Value> {
    let start = Instant::now();
    let name = order.name.as_str();
    while !fs::exists(format!("/sys/class/net/{name}"))? {
        ensure!(start.elapsed() < Duration::from_secs(30), "no {name} after 30 s");
        std::thread::sleep(Duration::from_millis(50));
    }
    sys::succeed(&["ip", "address", "replace", &order.address, "dev", name], QUICK)?;
    sys::succeed(&["ip", "link", "set", name, "up"], QUICK)?;
    let carrier = || fs::read_to_string(format!("/sys/class/net/{name}/carrier"));
    while carrier().unwrap_or_default().trim() != "1" {
        ensure!(start.elapsed() < Duration::from_secs(30), "{name} has no carrier after 30 s");
        std::thread::sleep(Duration::from_millis(50));
    }
    let mac = fs::read_to_string(format!("/sys/class/net/{name}/address"))?;
    Ok(json!(mac.trim()))
}

fn gone(name: &str) -> Result<Value> {
    let start = Instant::now();
    while fs::exists(format!("/sys/class/net/{name}"))? {
        ensure!(start.elapsed() < Duration::from_secs(30), "{name} is still there after 30 s");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(Value::Null)
}

#[derive(Deserialize)]
struct Echo {
    server: String,
    sizes: Vec<usize>,
    rounds: u64,
}

/// Sends datagrams of all sizes to an echo server.
fn echo(order: Echo) -> Result<Value> {
    let socket = net::client(&order.server)?;
    for round in 0..order.rounds {
        for size in &order.sizes {
            net::echo(&socket, *size, round << 32 | *size as u64)?;
        }
    }
    Ok(Value::Null)
}

#[derive(Deserialize)]
struct Answered {
    own: String,
    server: String,
}

/// Returns whether an echo server replies to any of a few datagrams that are sent from this
/// address.
fn answered(order: Answered) -> Result<Value> {
    let socket = UdpSocket::bind((order.own.as_str(), 0)).context(order.own)?;
    socket.connect(&order.server).context(order.server)?;
    socket.set_read_timeout(Some(Duration::from_millis(800)))?;
    for _ in 0..3 {
        // The send fails if ARP has had no reply.
        let _ = socket.send(b"anybody");
        let mut bytes = [0; 16];
        if socket.recv(&mut bytes).is_ok_and(|n| &bytes[..n] == b"anybody") {
            return Ok(json!(true));
        }
    }
    Ok(json!(false))
}

#[derive(Deserialize)]
struct Send {
    server: String,
    port: u16,
    bytes: u64,
    seed: u64,
}

fn send(order: Send) -> Result<Value> {
    Ok(json!(net::send((&order.server, order.port), order.bytes, order.seed)?))
}

#[derive(Deserialize)]
struct Receive {
    server: String,
    port: u16,
    seed: u64,
}

/// Connects and receives everything.
fn receive(order: Receive) -> Result<Value> {
    let stream = std::net::TcpStream::connect((order.server.as_str(), order.port))?;
    let (bytes, sum) = net::drain(stream, order.seed)?;
    Ok(json!({ "bytes": bytes, "sum": sum }))
}

fn echo_at(address: &str) -> Result<Value> {
    std::mem::forget(net::Echoes::at(address)?);
    Ok(Value::Null)
}

#[derive(Deserialize)]
struct Take {
    port: u16,
    seed: u64,
    group: Option<Group>,
}

/// A receiver of datagrams that runs during other requests.
static TAKER: Mutex<Option<Taker>> = Mutex::new(None);

fn take_start(order: Take) -> Result<Value> {
    let taker = Taker::start(order.port, order.seed, order.group)?;
    *TAKER.lock().expect("nobody panics") = Some(taker);
    Ok(Value::Null)
}

fn take_end() -> Result<Value> {
    let taker = TAKER.lock().expect("nobody panics").take().context("none are taken")?;
    Ok(json!(taker.end()?))
}

/// A sender of datagrams that runs during other requests.
static FLOOD: Mutex<Option<Flood>> = Mutex::new(None);

fn flood_start(flow: Flow) -> Result<Value> {
    // Large enough that the NIC always has a datagram to send, however rarely this domain is
    // scheduled.
    fs::write("/proc/sys/net/core/wmem_default", "524288")?;
    *FLOOD.lock().expect("nobody panics") = Some(Flood::start(flow)?);
    Ok(Value::Null)
}

fn flood_end() -> Result<Value> {
    let flood = FLOOD.lock().expect("nobody panics").take().context("no flood")?;
    Ok(json!(flood.end()?))
}

type Served = JoinHandle<Result<(u64, String)>>;

/// A receiver of one connection that runs during other requests; returns the number of bytes and
/// their checksum.
static SERVER: Mutex<Option<Served>> = Mutex::new(None);

/// Starts receiving one connection; returns its port.
fn serve(seed: u64) -> Result<Value> {
    let listener = TcpListener::bind("0.0.0.0:0")?;
    let port = listener.local_addr()?.port();
    let thread = thread::spawn(move || net::receive(&listener, seed));
    *SERVER.lock().expect("nobody panics") = Some(thread);
    Ok(json!(port))
}

fn served() -> Result<Value> {
    let thread = SERVER.lock().expect("nobody panics").take().context("none is taken")?;
    let (bytes, sum) = thread.join().map_err(|_| anyhow!("the server panicked"))??;
    Ok(json!({ "bytes": bytes, "sum": sum }))
}

/// Sends until the receiver has everything, during other requests.
fn stream(order: Send) -> Value {
    thread::spawn(move || net::send((&order.server, order.port), order.bytes, order.seed));
    Value::Null
}
