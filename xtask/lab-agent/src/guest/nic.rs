//! Addresses and traffic.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::read;
use crate::{net, sys};

const QUICK: Duration = Duration::from_secs(20);

/// What this module knows, done; `None` for other verbs.
pub fn obey(verb: &str, arguments: &Value) -> Option<Result<Value>> {
    let arguments = arguments.clone();
    Some(match verb {
        "nic-up" => read(arguments).and_then(up),
        "nic-gone" => read(arguments).and_then(|name: String| gone(&name)),
        "nic-echo" => read(arguments).and_then(echo),
        "tcp-send" => read(arguments).and_then(send),
        "tcp-receive" => read(arguments).and_then(receive),
        "echo-serve" => net::serve_echo().map(|()| Value::Null),
        _ => return None,
    })
}

#[derive(Deserialize)]
struct Up {
    name: String,
    address: String,
}

/// Waits for an interface, gives it an address, waits for its carrier.
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

/// Datagrams of every size to a server that sends them back.
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

/// Connects and takes what comes.
fn receive(order: Receive) -> Result<Value> {
    let stream = std::net::TcpStream::connect((order.server.as_str(), order.port))?;
    let (bytes, sum) = net::drain(stream, order.seed)?;
    Ok(json!({ "bytes": bytes, "sum": sum }))
}
