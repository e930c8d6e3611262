//! `pvio run`: hypervisor, driver domain and guest, until Ctrl-C.

use crate::cli::RunArgs;
use crate::demo;
use crate::failure::{Failure, say, say_aside};
use crate::guest::http::listing::human;
use crate::machine::devices::{DiskConfig, NicConfig};
use crate::machine::home::Home;
use crate::machine::{Machine, News, Plan, rights};
use crate::startup;
use pvio_blkback::image::{Disk, Format, Image, Spec};
use std::ffi::OsString;
use std::path::PathBuf;

/// Does it.
///
/// # Errors
/// A [`Failure`]; nothing is left running or lying about then.
pub fn run(args: &RunArgs) -> Result<(), Failure> {
    startup::prepare()?;
    // Before anything is started: it may make this another process.
    if let Some(disk) = &args.disk {
        look_at(&served(disk, args)?)?;
    }
    args.nics.site()?;
    if args.nic {
        rights::for_a_tap()?;
    }
    let (home, hypervisor) = Home::claim(args.common.state_dir.as_deref(), &args.common.name)?;
    let disk = match &args.disk {
        Some(disk) => served(disk, args)?,
        None => served(&Spec::file(Format::Raw, demo_image(&home)?).into(), args)?,
    };
    let size = look_at(&disk)?;
    let nic = args.nic.then(|| NicConfig {
        mac: args.mac,
        mtu: args.mtu,
        tap: args.tap.clone(),
        bridge: args.bridge.clone(),
        words: args.nics.clone(),
        host: args.bridge.is_none().then(|| (args.guest_ip.host(), args.guest_ip.prefix)),
    });
    let mut words: Vec<OsString> = vec!["--name".into(), args.common.name.clone().into()];
    if args.nic {
        words.extend(["--ip".into(), args.guest_ip.to_string().into()]);
        words.extend(["--mac".into(), args.mac.to_string().into()]);
        words.extend(["--gateway".into(), args.guest_ip.host().to_string().into()]);
    }
    let shown = match disk.spec.path() {
        Some(path) => path.display().to_string(),
        None => disk.spec.to_string(),
    };
    let disk = DiskConfig { disk };
    let name = args.common.name.clone();
    let plan = Plan { name, disk, nic, guest: ("guest", words), guest_on_terminal: false };
    let mut machine = Machine::start(plan, home, hypervisor)?;
    let about = format!(
        "state       {} (xenstore.sock, logs)\ndisk        {}, {}, read-only",
        machine.home().path().display(),
        shown,
        human(size)
    );
    let result = watch(&mut machine, args, &about);
    machine.shut_down();
    result
}

fn watch(machine: &mut Machine, args: &RunArgs, about: &str) -> Result<(), Failure> {
    loop {
        match machine.next_news()? {
            News::Ready => {
                say!("{about}");
                ready(args);
            }
            News::DriverRestarted(how) => {
                say!(
                    "the driver domain ended ({how}) and was started again; the guest attaches anew"
                );
            }
            News::Report(_) => {}
            News::Note(text) => say_aside!("pvio: {text}"),
            News::Done => return Err(Failure::new("the guest ended by itself", "")),
            News::Stopped => {
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
            "it is in a network namespace of its own; look inside with\n  \
             nsenter --target {pid} --user --net --preserve-credentials curl {url}"
        );
    } else {
        say!("  curl {url}");
    }
}

/// The disk as it is served: only to be read.
fn served(disk: &Disk, args: &RunArgs) -> Result<Disk, Failure> {
    let mut disk = args.common.disk(disk)?;
    disk.options.read_only = Some(true);
    Ok(disk)
}

/// Checks a disk as the driver domain will open it; returns its size in bytes.
fn look_at(disk: &Disk) -> Result<u64, Failure> {
    let image = Image::open_as(disk);
    let image = image.map_err(|e| Failure::of(e).as_input())?;
    Ok(image.geometry().sectors * 512)
}

fn demo_image(home: &Home) -> Result<PathBuf, Failure> {
    const NAME: &str = "demo.img";
    let path = home.path().join(NAME);
    let failed =
        |e| Failure::new(format!("the demo image {} cannot be made: {e}", path.display()), "");
    let mut file = home.dir().replace(NAME).map_err(failed)?;
    file.set_len(demo::SIZE).map_err(failed)?;
    demo::write_image(&mut file).map_err(failed)?;
    Ok(path)
}
