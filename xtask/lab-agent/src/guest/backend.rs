//! A guest that is a driver domain.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::read;
use crate::pattern::Sum;
use crate::sys::{self, modules};

const QUICK: Duration = Duration::from_secs(20);

const LOG: &str = "/run/pvio.log";

/// Returns the last lines of pvio's log, if it is running in this guest.
pub fn log() -> Vec<String> {
    let text = fs::read_to_string(LOG).unwrap_or_default();
    let lines: Vec<_> = text.lines().map(|line| line.chars().take(240).collect()).collect();
    lines[lines.len().saturating_sub(40)..].to_vec()
}

/// Executes the requests of this module; returns `None` for other verbs.
pub fn obey(verb: &str, arguments: &Value) -> Option<Result<Value>> {
    let arguments = arguments.clone();
    Some(match verb {
        "backend-serve" => read(arguments).and_then(|it: String| serve(&it)),
        "backend-nothing-left" => nothing_left(),
        "image-make" => read(arguments).and_then(make),
        "image-sum" => read(arguments).and_then(sum),
        _ => return None,
    })
}

/// Creates a bridge with an address, and starts `pvio serve` as in a driver domain.
fn serve(address: &str) -> Result<Value> {
    for module in ["xen-gntdev", "xen-evtchn", "tun", "bridge"] {
        modules::load(module)?;
    }
    sys::succeed(&["ip", "link", "add", "name", "xenbr0", "type", "bridge"], QUICK)?;
    sys::succeed(&["ip", "address", "add", address, "dev", "xenbr0"], QUICK)?;
    sys::succeed(&["ip", "link", "set", "xenbr0", "up"], QUICK)?;
    let mut serve = Command::new("pvio");
    serve.args(["serve", "--log", LOG]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = serve.spawn().context("start pvio serve")?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("its output")?).read_line(&mut line)?;
    ensure!(line.trim() == "ready", "pvio serve said {line:?}");
    Ok(Value::Null)
}

/// Checks that no interface of a guest is left, with a timeout.
fn nothing_left() -> Result<Value> {
    let start = Instant::now();
    loop {
        let names: Vec<_> = fs::read_dir("/sys/class/net")?
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name.starts_with("vif"))
            .collect();
        if names.is_empty() {
            return Ok(Value::Null);
        }
        ensure!(start.elapsed() < QUICK, "interfaces left: {names:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[derive(Deserialize)]
struct Image {
    path: PathBuf,
    mib: u64,
}

/// Creates an image of zeros.
fn make(image: Image) -> Result<Value> {
    File::create(&image.path)?.set_len(image.mib << 20)?;
    Ok(Value::Null)
}

/// Returns the checksum of an image's first `mib` MiB.
fn sum(order: Image) -> Result<Value> {
    let file = File::open(&order.path)?;
    let mut bytes = vec![0; 1 << 20];
    let mut sum = Sum::NEW;
    for mib in 0..order.mib {
        file.read_exact_at(&mut bytes, mib << 20)?;
        sum.add(&bytes);
    }
    Ok(json!(sum.text()))
}
