//! The driver domain's process.

use super::{ChildMessage, JoinArgs};
use crate::args::Cidr;
use crate::machine::home;
use clap::Args;
use pvio_daemon::control::Control;
use pvio_daemon::driver::{self, Options, XenstoreLink};
use pvio_daemon::failure::Failure;
use pvio_daemon::isolation::IsolationArgs;
use pvio_daemon::nics::NicArgs;
use pvio_daemon::served::Served;
use pvio_daemon::stop::{Stop, Wakeup};
use pvio_daemon::upgrade::handover;
use pvio_daemon::upgrade::progress::Upgrade;
use pvio_xenbus::handshake::common::BackendKind;

/// Arguments of `pvio domain driver`.
#[derive(Debug, Args)]
pub struct DriverArgs {
    #[command(flatten)]
    /// Arguments of all child processes.
    pub join: JoinArgs,
    /// The host's address on each NIC's tap
    #[arg(long, value_name = "CIDR")]
    pub host_ip: Option<Cidr>,
    #[command(flatten)]
    /// Options of NICs.
    pub nics: NicArgs,
    #[command(flatten)]
    /// Processes of the devices.
    pub isolation: IsolationArgs,
}

/// Runs the driver domain.
///
/// # Errors
/// There is no hypervisor, or the connection to it is lost.
pub fn run(args: &DriverArgs) -> Result<(), Failure> {
    let wakeup = Wakeup::new()?;
    let stop = Stop::on_signal(wakeup.clone())?;
    let domain = super::join(&args.join)?;
    let host = args.host_ip.map(|ip| (ip.address, ip.prefix));
    let nic_settings = args.nics.settings()?.into();
    let kinds = vec![BackendKind::Vbd, BackendKind::PvioVbd, BackendKind::Vif];
    let records = driver::records(&args.join.state_dir.join(home::RECORDS))?;
    let registry = args.join.state_dir.join(home::DEVICES);
    let isolation = args.isolation.isolation(&registry, "hosted", &records)?;
    let records = Some(records);
    let options = Options {
        host,
        kinds,
        records,
        resume: true,
        nic_settings,
        isolation,
        ..Options::default()
    };
    let served = Served::default();
    let _control = Control::listen(&args.join.state_dir, &served)?;
    let mut xs = XenstoreLink::fixed(domain.xenstore().map_err(Failure::of)?);
    let me = (&domain, domain.id());
    driver::run(me, &mut xs, &options, &served, (&stop, &wakeup), || ChildMessage::Ready.send())
        .map_err(|e| Failure::of(e).context("the connection to the hypervisor was lost"))?;
    match served.upgrade().and_then(Upgrade::request) {
        Some(request) => Err(handover::begin(request, &args.join.state_dir)),
        None => Ok(()),
    }
}
