//! The agent in a guest: executes requests that dom0 sends over the console.
//!
//! | module | contents |
//! |---|---|
//! | [`backend`] | a guest that is a driver domain |
//! | [`direct`] | a disk without the page cache |
//! | [`disk`] | writing, reading and checksums of disks |
//! | [`drivers`] | the kernel's frontends: load, unbind, bind |
//! | [`files`] | a directory of many files |
//! | [`load`] | background I/O during other requests |
//! | [`measure`] | measurements by the guest's own clock |
//! | [`nic`] | addresses and traffic |
//! | [`own`] | pvio's frontends, in user space |

mod backend;
mod direct;
mod disk;
mod drivers;
mod files;
mod load;
mod measure;
mod nic;
mod own;

use std::fs;
use std::io::{self, BufRead, Write};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::system::RebootCommand;
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::link::{Answer, HELLO, Request};
use crate::sys::{self, modules, uptime};

/// Executes requests until one to power off.
///
/// # Errors
/// The console is gone.
pub fn run() -> Result<()> {
    let input = io::stdin();
    if let Ok(mut mode) = tcgetattr(&input) {
        mode.make_raw();
        tcsetattr(&input, OptionalActions::Now, &mode)?;
    }
    // From here on, the kernel prints nothing to the console except panics, so that no message is
    // interleaved with a reply.
    fs::write("/proc/sys/kernel/printk", "1 4 1 7")?;
    let words = fs::read_to_string("/proc/cmdline")?;
    let frontends = !words.split_whitespace().any(|word| word == "pvio.bare");
    let loaded = if frontends { load_frontends() } else { Ok(()) };
    let outcome = loaded.map(|()| json!({ "uptime": uptime::seconds() }));
    answer(HELLO, outcome)?;
    let mut load = load::Load::default();
    for line in input.lock().lines() {
        let Some(request) = Request::parse(&line?) else { continue };
        let number = request.number;
        answer(number, obey(request, &mut load))?;
    }
    bail!("the console is closed")
}

fn load_frontends() -> Result<()> {
    let line = fs::read_to_string("/proc/cmdline")?;
    let order = line.split_whitespace().find_map(|word| word.strip_prefix("pvio.ring-order="));
    let order = order.map_or_else(String::new, |order| format!("max_ring_page_order={order}"));
    modules::load_with("xen-blkfront", &order)?;
    modules::load("xen-netfront")
}

fn answer(number: u64, outcome: Result<Value>) -> Result<()> {
    let outcome = outcome.map_err(|error| format!("{error:#}"));
    let mut out = io::stdout().lock();
    writeln!(out, "{}\r", Answer { number, outcome }.line())?;
    out.flush().context("the console")
}

fn obey(request: Request, load: &mut load::Load) -> Result<Value> {
    let Request { verb, arguments, .. } = request;
    match verb.as_str() {
        "hello" => Ok(Value::Null),
        "run" => run_program(read(arguments)?),
        "command-line" => Ok(json!(fs::read_to_string("/proc/cmdline")?)),
        "logs" => Ok(json!({ "kernel": kernel_log(), "pvio": backend::log() })),
        "mount" => {
            let [kind, device, folder]: [String; 3] = read(arguments)?;
            sys::mount::mount(&kind, &device, &folder, "").map(|()| Value::Null)
        }
        "unmount" => {
            let folder: String = read(arguments)?;
            rustix::mount::unmount(folder, rustix::mount::UnmountFlags::empty())?;
            Ok(Value::Null)
        }
        "module" => modules::load(&read::<String>(arguments)?).map(|()| Value::Null),
        "kernel" => Ok(json!(fs::read_to_string("/proc/sys/kernel/osrelease")?.trim())),
        "processors" => processors(read(arguments)?),
        "poweroff" => end(RebootCommand::PowerOff),
        "reboot" => end(RebootCommand::Restart),
        "crash" => {
            fs::write("/proc/sysrq-trigger", "c")?;
            bail!("it did not crash")
        }
        "load-start" => load.start(read(arguments)?),
        "load-stop" => load.stop(),
        _ => {
            let done = disk::obey(&verb, &arguments)
                .or_else(|| backend::obey(&verb, &arguments))
                .or_else(|| files::obey(&verb, &arguments))
                .or_else(|| nic::obey(&verb, &arguments))
                .or_else(|| measure::obey(&verb, &arguments))
                .or_else(|| drivers::obey(&verb, &arguments))
                .or_else(|| own::obey(&verb, &arguments));
            done.with_context(|| format!("{verb}: no such verb"))?
        }
    }
}

/// Deserialises the arguments of a verb.
fn read<T: DeserializeOwned>(arguments: impl Into<Value>) -> Result<T> {
    serde_json::from_value(arguments.into()).context("the arguments")
}

#[derive(Deserialize)]
struct Program {
    words: Vec<String>,
    seconds: u64,
}

/// Runs a program of the image, which must succeed.
fn run_program(program: Program) -> Result<Value> {
    let words: Vec<&str> = program.words.iter().map(String::as_str).collect();
    let output = sys::succeed(&words, Duration::from_secs(program.seconds))?;
    // The console is slow, so only the end of the output is sent.
    let tail = output.char_indices().rev().nth(2999).map_or(0, |(at, _)| at);
    Ok(json!(output[tail..]))
}

/// Sets up to `wanted` processors online, as udev would; returns those that are online, in the
/// kernel's format. The kernel sets a processor offline itself when the toolstack removes it, but
/// leaves setting it online to user space.
fn processors(wanted: u32) -> Result<Value> {
    for n in 1..wanted {
        // The processor may not exist yet, or may be online already.
        let _ = fs::write(format!("/sys/devices/system/cpu/cpu{n}/online"), "1");
    }
    let online = fs::read_to_string("/sys/devices/system/cpu/online")?;
    Ok(json!(online.trim()))
}

fn end(how: RebootCommand) -> Result<Value> {
    rustix::fs::sync();
    rustix::system::reboot(how)?;
    Ok(Value::Null)
}

/// Returns the kernel's last messages.
fn kernel_log() -> Vec<String> {
    const O_NONBLOCK: i32 = 0o4000;
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    let mut lines = Vec::new();
    let kmsg = fs::File::options().read(true).custom_flags(O_NONBLOCK).open("/dev/kmsg");
    if let Ok(mut kmsg) = kmsg {
        let mut record = [0; 8192];
        while let Ok(n) = kmsg.read(&mut record) {
            let text = String::from_utf8_lossy(&record[..n]);
            let text = text.split_once(';').map_or(text.as_ref(), |(_, text)| text);
            lines.push(text.lines().next().unwrap_or_default().to_owned());
        }
    }
    lines.split_off(lines.len().saturating_sub(40))
}
