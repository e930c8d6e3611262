//! Boot of dom0: xenstored, xenconsoled, a bridge, the directory shared with the host.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::sys::{self, modules, mount};

const QUICK: Duration = Duration::from_secs(30);

/// Modules that user space needs for Xen; the kernel's backends are not included.
const MODULES: &[&str] = &[
    "xen-evtchn",
    "xen-gntdev",
    "xen-gntalloc",
    "xen-privcmd",
    "xenfs",
    "loop",
    "tun",
    "bridge",
    "virtio_pci",
    "9pnet_virtio",
    "9p",
];

/// Addresses of the bridge: the first NICs of guests are in the first network, the second NICs in
/// the second.
pub const ADDRESSES: [&str; 2] = ["10.0.0.1/24", "10.0.1.1/24"];

/// Boots dom0.
///
/// # Errors
/// A part of it fails.
pub fn up() -> Result<()> {
    for name in MODULES {
        modules::load(name)?;
    }
    mount::mount("xenfs", "xenfs", "/proc/xen", "")?;
    fs::create_dir_all("/run/xen")?;
    fs::create_dir_all("/run/lock")?;
    fs::create_dir_all("/run/xenstored")?;
    fs::create_dir_all("/var/log/xen")?;
    sys::succeed(&["xenstored", "--pid-file", "/run/xenstored.pid"], QUICK)?;
    sys::succeed(&["xen-init-dom0"], QUICK)?;
    sys::succeed(&["xenconsoled", "--pid-file", "/run/xenconsoled.pid"], QUICK)?;
    let ip = |words: &str| {
        let words: Vec<_> = std::iter::once("ip").chain(words.split(' ')).collect();
        sys::succeed(&words, QUICK)
    };
    ip("link set lo up")?;
    ip("link add xenbr0 type bridge")?;
    for address in ADDRESSES {
        ip(&format!("address add {address} dev xenbr0"))?;
    }
    ip("link set xenbr0 up")?;
    fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").ok();
    mount::mount("9p", "share", "/share", "trans=virtio,version=9p2000.L,msize=131072")
}

/// Runs a command and then an interactive shell.
///
/// # Errors
/// It does not start.
pub fn shell(words: &str) -> Result<()> {
    sys::succeed(&["busybox", "--install", "-s", "/usr/bin"], QUICK)?;
    modules::load("xen-blkback")?;
    modules::load("xen-netback")?;
    println!("dom0 of the lab. /share is a folder of the host's, /lab has a kernel and images");
    println!("for guests; the kernel's backends are loaded. Ctrl-A X ends it at once, exit in");
    println!("good order. {words}");
    let mut shell = Command::new("busybox");
    shell.args(["setsid", "cttyhack", "busybox", "sh"]).env("HOME", "/").env("TERM", "vt100");
    let error = shell.exec();
    Err(error).context("a shell")
}
