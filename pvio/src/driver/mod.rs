//! The driver domain: serves every disk and network interface the toolstack makes for it.
//!
//! One thread watches xenstore and steps the devices; each device's queue has a thread of its own.
//! It sleeps until xenstore, a worker or a signal has something to say.

mod devices;

use crate::domain::stop::{Bell, Stop, sleep};
use crate::failure::Failure;
use devices::Devices;
use pvio_blkback::Vbd;
use pvio_blkback::host::ImageServer;
use pvio_hosted::Domain;
use pvio_netback::Vif;
use pvio_netback::host::{TapOptions, TapServer};
use pvio_xenbus::client::Client;
use pvio_xenbus::driver::BackendDriver;
use pvio_xenbus::handshake::common::DeviceClass;
use pvio_xenbus::{Xenstore, XsError};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::sync::Arc;

/// What the driver domain adds to what the toolstack says of its devices.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// An address of the host on each NIC's tap, and its prefix length.
    pub host: Option<(Ipv4Addr, u8)>,
}

/// Runs the driver domain until it is told to stop, then closes every device in good order.
///
/// # Errors
/// When the hypervisor is gone.
pub fn run(domain: &Domain, options: &Options, stop: &Stop, bell: &Bell) -> Result<(), Failure> {
    let lost = |e: XsError| Failure::new(format!("the hypervisor is gone: {e}"), "");
    let mut xs = domain.xenstore().map_err(Failure::of)?;
    serve(domain, options, &mut xs, stop, bell).map_err(lost)
}

fn serve(
    domain: &Domain,
    options: &Options,
    xs: &mut Client,
    stop: &Stop,
    bell: &Bell,
) -> Result<(), XsError> {
    let id = domain.id();
    let (platform, ring) = (domain.clone(), bell.clone());
    let mut disks = Devices::new(DeviceClass::Vbd, id, move |addr| {
        let ring = ring.clone();
        let server = ImageServer::new(Arc::new(move || ring.ring()));
        // A frontend that is Connected already was served by a predecessor of this process.
        BackendDriver::restarted(addr, Vbd::new(platform.clone(), server))
    });
    let (platform, ring, address) = (domain.clone(), bell.clone(), options.host);
    let mut nics = Devices::new(DeviceClass::Vif, id, move |addr| {
        let ring = ring.clone();
        let options = TapOptions { address, ..TapOptions::default() };
        let server = TapServer::new(options, Arc::new(move || ring.ring()));
        BackendDriver::restarted(addr, Vif::new(platform.clone(), server))
    });
    disks.watch(xs)?;
    nics.watch(xs)?;
    tracing::info!(domain = id.0, "the driver domain serves");
    while !stop.is_told() {
        while let Some(event) = xs.poll_event()? {
            disks.event(xs, &event)?;
            nics.event(xs, &event)?;
        }
        // Not being able to sleep would be a spin; there is no reason for it but memory.
        sleep(&[xs.as_fd(), bell.as_fd()], None).map_err(|_| XsError::Closed)?;
        if bell.take() {
            disks.step_all(xs)?;
            nics.step_all(xs)?;
        }
    }
    tracing::info!("closing every device");
    disks.shut_down(xs).and(nics.shut_down(xs))
}
