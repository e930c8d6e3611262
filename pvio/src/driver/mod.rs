//! The driver domain: serves every disk and network interface the toolstack makes for it.
//!
//! One thread watches xenstore and steps the devices; each device's queue has a thread of its own.
//! It sleeps until xenstore, a worker or a signal has something to say.

mod devices;

use crate::domain::stop::{Bell, Stop, sleep};
use devices::Devices;
use pvio_blkback::Vbd;
use pvio_blkback::host::ImageServer;
use pvio_grant_table::DomId;
use pvio_netback::Vif;
use pvio_netback::host::{TapOptions, TapServer};
use pvio_xenbus::client::Client;
use pvio_xenbus::driver::{BackendDriver, Surroundings};
use pvio_xenbus::handshake::common::{BackendKind, DeviceClass};
use pvio_xenbus::{Xenstore, XsError};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::sync::Arc;

/// How the driver domain serves, beyond what the toolstack says of its devices.
#[derive(Debug, Clone)]
pub struct Options {
    /// An address of the host on each NIC's tap, and its prefix length.
    pub host: Option<(Ipv4Addr, u8)>,
    /// The kinds of backend to be.
    pub kinds: Vec<BackendKind>,
    /// Serve only this domain's devices.
    pub only: Option<DomId>,
    /// Who else looks after the devices.
    pub surroundings: Surroundings,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            host: None,
            kinds: vec![BackendKind::Vbd, BackendKind::Vif],
            only: None,
            surroundings: Surroundings::Plain,
        }
    }
}

/// What a platform must do for both kinds of device, and for threads.
pub trait Platform:
    pvio_blkback::vbd::Platform<Channel: AsFd> + pvio_netback::Platform + Send + 'static
{
}
impl<P> Platform for P where
    P: pvio_blkback::vbd::Platform<Channel: AsFd> + pvio_netback::Platform + Send + 'static
{
}

/// Runs the driver domain until it is told to stop, then closes every device in good order.
/// `ready` is called once new devices are heard of.
///
/// # Errors
/// When xenstore is gone.
pub fn run<P: Platform>(
    (platform, id): (&P, DomId),
    xs: &mut Client,
    options: &Options,
    (stop, bell): (&Stop, &Bell),
    ready: impl FnOnce(),
) -> Result<(), XsError> {
    let within = options.surroundings;
    let of_class = |class| options.kinds.iter().copied().filter(move |k| k.class() == class);
    let (shared, ring) = (platform.clone(), bell.clone());
    let disks = of_class(DeviceClass::Vbd).collect();
    let mut disks = Devices::new(disks, id, options.only, move |addr| {
        let ring = ring.clone();
        let server = ImageServer::new(Arc::new(move || ring.ring()));
        // A frontend that is Connected already was served by a predecessor of this process.
        BackendDriver::restarted(addr, Vbd::new(shared.clone(), server)).within(within)
    });
    let (shared, ring, address) = (platform.clone(), bell.clone(), options.host);
    let nics = of_class(DeviceClass::Vif).collect();
    let mut nics = Devices::new(nics, id, options.only, move |addr| {
        let ring = ring.clone();
        let options = TapOptions { address, ..TapOptions::default() };
        let server = TapServer::new(options, Arc::new(move || ring.ring()));
        BackendDriver::restarted(addr, Vif::new(shared.clone(), server)).within(within)
    });
    disks.watch(xs)?;
    nics.watch(xs)?;
    tracing::info!(domain = id.0, kinds = ?options.kinds, ?within, "the driver domain serves");
    ready();
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
