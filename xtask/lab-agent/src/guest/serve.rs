//! A guest that is a driver domain: pvio serves other guests from it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::read;
use crate::pattern::Sum;
use crate::sys::{self, modules, mount};

const QUICK: Duration = Duration::from_secs(20);
const MODULES: &[&str] =
    &["xen-evtchn", "xen-gntdev", "xen-gntalloc", "xenfs", "tun", "bridge", "loop"];
const LOG: &str = "/var/log/pvio.log";

/// What this module knows, done; `None` for other verbs.
pub fn obey(verb: &str, arguments: &Value) -> Option<Result<Value>> {
    let arguments = arguments.clone();
    Some(match verb {
        "serve" => read(arguments).and_then(serve),
        "serve-log" => Ok(json!(fs::read_to_string(LOG).unwrap_or_default())),
        "served-nothing-left" => nothing_left(),
        "file-sum" => read(arguments).and_then(sum),
        _ => return None,
    })
}

#[derive(Deserialize)]
struct Serve {
    image: PathBuf,
    mib: u64,
    address: String,
}

fn serve(order: Serve) -> Result<Value> {
    for name in MODULES {
        modules::load(name)?;
    }
    mount::mount("xenfs", "xenfs", "/proc/xen", "")?;
    for words in [
        ["ip", "link", "add", "xenbr0", "type", "bridge"],
        ["ip", "address", "add", &order.address, "dev", "xenbr0"],
        ["ip", "link", "set", "dev", "xenbr0", "up"],
    ] {
        sys::succeed(&words, QUICK)?;
    }
    File::create(&order.image)?.set_len(order.mib << 20)?;
    let mut pvio = Command::new("/usr/bin/pvio");
    pvio.args(["serve", "--hotplug", "self", "--log", LOG]);
    pvio.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = pvio.spawn().context("start pvio serve")?;
    let output = child.stdout.take().context("its output")?;
    let (sender, ready) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if line.trim() == "ready" {
                let _ = sender.send(());
            }
        }
        let _ = child.wait();
    });
    let log = || fs::read_to_string(LOG).unwrap_or_default();
    ready.recv_timeout(QUICK).map_err(|_| anyhow::anyhow!("pvio is not ready: {}", log()))?;
    Ok(Value::Null)
}

/// Checks that no interface of a guest's is left, after a while.
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
struct Place {
    path: PathBuf,
    mib: u64,
}

/// The sum of a file's first MiBs.
fn sum(order: Place) -> Result<Value> {
    let file = File::open(&order.path)?;
    let mut bytes = vec![0; 1 << 20];
    let mut sum = Sum::NEW;
    for mib in 0..order.mib {
        file.read_exact_at(&mut bytes, mib << 20)?;
        sum.add(&bytes);
    }
    Ok(json!(sum.text()))
}
