//! The guest that serves its disk over HTTP.

use super::disk::AttachedDisk;
use super::nic::AttachedNic;
use super::{ChildMessage, JoinArgs, watcher};
use crate::args::{Cidr, station};
use crate::guest::fs::thread::{FsResponse, FsThread, Reply};
use crate::guest::fs::{Disk, FsError, FsInfo};
use crate::guest::http::{Config, Server, ServerStatus};
use crate::guest::meter;
use crate::guest::status::Devices;
use crate::machine::devices::{DISK, NIC};
use clap::Args;
use crossbeam_channel::Receiver;
use pvio_daemon::failure::Failure;
use pvio_daemon::stop::{Stop, Wakeup, sleep};
use pvio_xenbus::handshake::vif::Mac;
use std::net::Ipv4Addr;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Arguments of `pvio domain guest`.
#[derive(Debug, Args)]
pub struct GuestArgs {
    #[command(flatten)]
    /// Arguments of all child processes.
    pub join: JoinArgs,
    /// The guest's name
    #[arg(long)]
    pub name: String,
    /// The guest has a NIC, with this address
    #[arg(long)]
    pub ip: Option<Cidr>,
    /// The NIC's MAC address
    #[arg(long, value_parser = station)]
    pub mac: Option<Mac>,
    /// The default gateway
    #[arg(long)]
    pub gateway: Option<Ipv4Addr>,
}

/// How long to wait for the file system to be mounted before the guest reports that it is ready.
const MOUNT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the devices may take to close; then the process exits in any case.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(4);

/// Runs the guest.
///
/// # Errors
/// A device cannot be attached; the failure has its backend's message.
pub fn run(args: &GuestArgs) -> Result<(), Failure> {
    let wakeup = Wakeup::new()?;
    let stop = Stop::on_signal(wakeup.clone())?;
    let domain = super::join(&args.join)?;
    let devices = Devices::default();
    let disk = AttachedDisk::attach(&domain, DISK, devices.clone())?;
    let (http, read) = (meter::Shared::default(), meter::Shared::default());
    let waker_target = wakeup.clone();
    let waker = Box::new(move || waker_target.wake());
    let started = FsThread::start_metered(Disk::new(disk), waker, Some(read.clone()));
    let (fs, responses) =
        started.map_err(|e| Failure::new(format!("a thread cannot start: {e}"), ""))?;
    let mut addrs = vec![DISK];
    addrs.extend(args.ip.map(|_| NIC));
    let poller = fs.backend_poller();
    watcher::start(&domain, addrs, devices.clone(), move |addr| {
        if let Some(poller) = poller.as_ref().filter(|_| addr == DISK) {
            poller.poll_backend();
        }
    })?;
    super::hotplug::start(&domain, devices.clone())?;
    let server_status = ServerStatus {
        name: args.name.clone(),
        address: args.ip.map(|ip| ip.address.to_string()).unwrap_or_default(),
        started: Instant::now(),
        fs: None,
        devices: devices.clone(),
        http,
        disk: read,
    };
    let mounted = wait_for_mount(&fs, &responses);
    if let Some(Err(e)) = &mounted {
        ChildMessage::Note(format!("the guest cannot read its disk: {}", e.line())).send();
    }
    let server_status = ServerStatus { fs: mounted, ..server_status };
    let Some(ip) = args.ip else {
        ChildMessage::Ready.send();
        while !stop.is_requested() {
            sleep(&[wakeup.as_fd()], None)?;
            wakeup.take();
        }
        exit_after_timeout();
        return Ok(());
    };
    let mut nic = AttachedNic::attach(&domain, NIC, devices, &stop, &wakeup)?;
    let mac = nic.mac().or(args.mac.map(|mac| mac.0));
    let mac = mac.ok_or_else(|| Failure::new("the NIC has no station address", ""))?;
    let config =
        Config { mac, address: ip.address, prefix: ip.prefix, gateway: args.gateway, port: 80 };
    let mut server = Server::new(config, fs, responses, server_status);
    ChildMessage::Ready.send();
    let mut result = Ok(());
    server.run(&mut nic, |nic, time| {
        if let Err(failure) = nic.wait(&wakeup, time) {
            result = Err(failure);
            return ControlFlow::Break(());
        }
        if stop.is_requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    exit_after_timeout();
    nic.close();
    // Also ends the disk thread, which closes the disk.
    drop(server);
    result
}

/// Returns the mounted file system, or `None` if the disk thread does not reply in time.
fn wait_for_mount(
    fs: &FsThread,
    responses: &Receiver<FsResponse>,
) -> Option<Result<FsInfo, FsError>> {
    fs.info(0).ok()?;
    match responses.recv_timeout(MOUNT_TIMEOUT).ok()?.result {
        Ok(Reply::Info(info)) => {
            tracing::info!(kind = info.kind, label = %info.label, "file system mounted read-only");
            Some(Ok(info))
        }
        Ok(_) => None,
        Err(e) => Some(Err(e)),
    }
}

/// Exits the process after a timeout even if a device does not close, for example because the
/// driver domain is gone.
fn exit_after_timeout() {
    let waiting = std::thread::Builder::new().name("close-timeout".into()).spawn(|| {
        std::thread::sleep(CLOSE_TIMEOUT);
        tracing::warn!("the devices did not close in time");
        std::process::exit(0);
    });
    if waiting.is_err() {
        std::process::exit(0);
    }
}
