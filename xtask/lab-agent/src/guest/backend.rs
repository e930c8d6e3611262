//! A guest that is a driver domain.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::read;
use crate::sys::{self, modules};

const QUICK: Duration = Duration::from_secs(20);

/// What this module knows, done; `None` for other verbs.
pub fn obey(verb: &str, arguments: &Value) -> Option<Result<Value>> {
    match verb {
        "backend-serve" => Some(read(arguments.clone()).and_then(|it: String| serve(&it))),
        _ => None,
    }
}

/// Makes a bridge with an address, and starts `pvio serve` as a driver domain has it.
fn serve(address: &str) -> Result<Value> {
    for module in ["xen-gntdev", "xen-evtchn", "tun", "bridge"] {
        modules::load(module)?;
    }
    sys::succeed(&["ip", "link", "add", "name", "xenbr0", "type", "bridge"], QUICK)?;
    sys::succeed(&["ip", "address", "add", address, "dev", "xenbr0"], QUICK)?;
    sys::succeed(&["ip", "link", "set", "xenbr0", "up"], QUICK)?;
    let mut serve = Command::new("pvio");
    serve.args(["serve", "--log", "/run/pvio.log"]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = serve.spawn().context("start pvio serve")?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("its output")?).read_line(&mut line)?;
    ensure!(line.trim() == "ready", "pvio serve said {line:?}");
    Ok(Value::Null)
}
