//! `pvio run`: hypervisor, driver domain and guest, until Ctrl-C.

use crate::args::{Cidr, CommonArgs, station};
use crate::image;
use crate::machine::devices::{DiskConfig, NicConfig};
use crate::machine::home::Home;
use crate::machine::{Machine, MachineEvent, Plan, rights};
use clap::Args;
use pvio_daemon::disks::args::disk;
use pvio_daemon::failure::{Failure, say, say_aside};
use pvio_daemon::nics::NicArgs;
use pvio_daemon::startup;
use pvio_daemon::units::human;
use pvio_storage::image::{Disk, Format, Image, Spec};
use pvio_xenbus::handshake::vif::Mac;
use std::ffi::OsString;
use std::path::PathBuf;

/// Arguments of `pvio run`.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Disk with an ext2/3/4 or FAT file system; a demo image if left out. A path, or
    /// `[OPTIONS]FORMAT:PATH` with any format and option of docs/disks.md
    #[arg(long, value_name = "DISK", value_parser = disk())]
    pub disk: Option<Disk>,
    /// Attach a NIC and serve HTTP over it
    #[arg(long)]
    pub nic: bool,
    #[command(flatten)]
    /// Arguments of both commands.
    pub common: CommonArgs,
    /// The guest's address and network prefix; the host has the first address of the network
    #[arg(long, value_name = "CIDR", default_value = "10.107.0.2/24")]
    pub guest_ip: Cidr,
    /// The guest's MAC address
    #[arg(long, value_name = "MAC", value_parser = station, default_value = "00:16:3e:6b:00:02")]
    pub mac: Mac,
    /// Bridge to add the tap to, instead of a host address on the tap
    #[arg(long, value_name = "NAME")]
    pub bridge: Option<String>,
    /// The tap's name
    #[arg(long, value_name = "NAME", default_value = "pvio0")]
    pub tap: String,
    #[command(flatten)]
    /// Options of the NIC.
    pub nics: NicArgs,
    /// Maximum size of a packet in bytes, without its Ethernet header
    #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u32).range(576..=9000))]
    pub mtu: u32,
}

/// Runs the command.
///
/// # Errors
/// A [`Failure`]; everything that was started has been stopped and removed.
pub fn run(args: &RunArgs) -> Result<(), Failure> {
    startup::prepare()?;
    // Checked before anything is started, since `rights::for_a_tap` may execute the program again.
    if let Some(disk) = &args.disk {
        open_image(&as_served(disk, args)?)?;
    }
    args.nics.settings()?;
    if args.nic {
        rights::for_a_tap()?;
    }
    let (home, hypervisor) = Home::claim(args.common.state_dir.as_deref(), &args.common.name)?;
    let disk = match &args.disk {
        Some(disk) => as_served(disk, args)?,
        None => as_served(&Spec::file(Format::Raw, demo_image(&home)?).into(), args)?,
    };
    let size = open_image(&disk)?;
    let nic = args.nic.then(|| NicConfig {
        mac: args.mac,
        mtu: args.mtu,
        tap: args.tap.clone(),
        bridge: args.bridge.clone(),
        nic_args: args.nics.clone(),
        host: args.bridge.is_none().then(|| (args.guest_ip.host(), args.guest_ip.prefix)),
    });
    let mut guest_args: Vec<OsString> = vec!["--name".into(), args.common.name.clone().into()];
    if args.nic {
        guest_args.extend(["--ip".into(), args.guest_ip.to_string().into()]);
        guest_args.extend(["--mac".into(), args.mac.to_string().into()]);
        guest_args.extend(["--gateway".into(), args.guest_ip.host().to_string().into()]);
    }
    let image_name = match disk.spec.path() {
        Some(path) => path.display().to_string(),
        None => disk.spec.to_string(),
    };
    let disk = DiskConfig { disk };
    let name = args.common.name.clone();
    let (guest, isolation) = (("guest", guest_args), args.common.isolation.clone());
    let plan = Plan { name, disk, nic, guest, guest_on_terminal: false, isolation };
    let mut machine = Machine::start(plan, home, hypervisor)?;
    let about = format!(
        "state       {} (xenstore.sock, logs)\ndisk        {}, {}, read-only",
        machine.home().path().display(),
        image_name,
        human(size)
    );
    let result = watch(&mut machine, args, &about);
    machine.shut_down();
    result
}

fn watch(machine: &mut Machine, args: &RunArgs, about: &str) -> Result<(), Failure> {
    loop {
        match machine.next_event()? {
            MachineEvent::Ready => {
                say!("{about}");
                ready(args);
            }
            MachineEvent::DriverRestarted(exit) => {
                say!(
                    "the driver domain ended ({exit}) and was started again; the guest reconnects"
                );
            }
            MachineEvent::Report(_) => {}
            MachineEvent::Note(text) => say_aside!("pvio: {text}"),
            MachineEvent::Done => return Err(Failure::new("the guest ended unexpectedly", "")),
            MachineEvent::Stopped => {
                say!("\nstopping");
                return Ok(());
            }
        }
    }
}

fn ready(args: &RunArgs) {
    if !args.nic {
        say!("ready: the guest has its disk, and no NIC to serve it over (--nic); Ctrl-C stops");
        return;
    }
    let url = format!("http://{}/", args.guest_ip.address);
    match &args.bridge {
        Some(bridge) => {
            say!("nic         {} on bridge {bridge}, guest {}", args.tap, args.guest_ip)
        }
        None => {
            let (host, prefix) = (args.guest_ip.host(), args.guest_ip.prefix);
            say!("nic         {}, host {host}/{prefix}, guest {}", args.tap, args.guest_ip);
        }
    }
    say!("ready: {url}   Ctrl-C stops");
    if rights::is_inside() {
        let pid = std::process::id();
        say!(
            "it runs in its own network namespace; enter it with\n  \
             nsenter --target {pid} --user --net --preserve-credentials curl {url}"
        );
    } else {
        say!("  curl {url}");
    }
}

/// Returns the disk with the options it is served with: read-only.
fn as_served(disk: &Disk, args: &RunArgs) -> Result<Disk, Failure> {
    let mut disk = args.common.disk(disk)?;
    disk.options.read_only = Some(true);
    Ok(disk)
}

/// Opens a disk as the driver domain will; returns its size in bytes.
fn open_image(disk: &Disk) -> Result<u64, Failure> {
    let image = Image::open_as(disk);
    let image = image.map_err(|e| Failure::of(e).as_input())?;
    Ok(image.geometry().sectors * 512)
}

fn demo_image(home: &Home) -> Result<PathBuf, Failure> {
    const NAME: &str = "demo.img";
    let path = home.path().join(NAME);
    let failed =
        |e| Failure::new(format!("the demo image {} cannot be created: {e}", path.display()), "");
    let mut file = home.dir().replace(NAME).map_err(failed)?;
    file.set_len(image::SIZE).map_err(failed)?;
    image::write_image(&mut file).map_err(failed)?;
    Ok(path)
}
