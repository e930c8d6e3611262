//! Standing in for the device model that `xl` starts for a guest with `qdisk` disks.
//!
//! `xl` leaves images to a program it starts for the guest, QEMU usually. A guest whose
//! configuration says `device_model_override="/usr/bin/pvio-dm"`, where `pvio-dm` is a link to
//! `pvio`, has its images served by a process of pvio instead: one for each guest, that ends with
//! it, and needs neither `pvio serve` nor that Linux's own backends be absent.
//!
//! The program is called as QEMU is. Of its many arguments three matter: for which domain
//! (`-xen-domid`), and where to listen for QMP (`-chardev socket,…`), over which `xl` asks only
//! whether all is well. Then it writes `running` to `device-model/<domid>/state`.

mod qmp;

use crate::control;
use crate::domain::stop::{Bell, Stop};
use crate::driver::{self, Options};
use crate::failure::Failure;
use crate::lock::{Scope, ServiceLock};
use crate::serve;
use crate::served::Served;
use crate::startup;
use pvio_blkback::{Config, Policy};
use pvio_grant_table::DomId;
use pvio_xenbus::handshake::common::{BackendKind, announce_device_model};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The name that makes `pvio` a device model.
pub const NAME: &str = "pvio-dm";

/// What matters of a device model's arguments.
#[derive(Debug, PartialEq, Eq)]
struct Args {
    guest: DomId,
    sockets: Vec<PathBuf>,
}

/// Serves a guest's `qdisk` disks until it is told to stop, as `xl` tells a device model.
///
/// # Errors
/// A [`Failure`], which `xl` shows from the guest's `qemu-dm-….log`.
pub fn run(args: impl Iterator<Item = OsString>) -> Result<(), Failure> {
    let args: Vec<String> = args.map(|arg| arg.to_string_lossy().into_owned()).collect();
    let args = parse(&args)?;
    startup::prepare()?;
    serve::log_to(None)?;
    let bell = Bell::new()?;
    let stop = Stop::on_signal(bell.clone())?;
    let host = serve::Host::open()?;
    let folder = Path::new(control::FOLDER);
    let _lock = ServiceLock::take(folder, &[BackendKind::Qdisk], Scope::OneGuest)?;
    let mut xs = host.xenstore()?;
    for socket in &args.sockets {
        qmp::listen(socket)?;
    }
    let options = Options {
        kinds: vec![BackendKind::Qdisk],
        only: Some(args.guest),
        disks: Config { policy: Policy::PersistentOrCopy, ..Config::for_this_machine() },
        ..Options::default()
    };
    // libxl waits for this word, and by then the guest's disks have to be looked after.
    let mut own = host.xenstore()?;
    let mut announced = Ok(());
    let served = driver::run(
        (host.domain(), host.id()),
        &mut xs,
        &options,
        &Served::default(),
        (&stop, &bell),
        || {
            announced = announce_device_model(&mut own, args.guest);
        },
    );
    announced.map_err(Failure::of)?;
    served.map_err(serve::lost)
}

fn parse(args: &[String]) -> Result<Args, Failure> {
    let after = |flag: &'static str| {
        args.windows(2).filter(move |pair| pair[0] == flag).map(|pair| pair[1].as_str())
    };
    let guest = after("-xen-domid").next().and_then(|id| id.parse().ok()).map(DomId);
    let guest = guest.ok_or_else(|| {
        Failure::input(
            format!("{NAME} is to be started by xl, with -xen-domid"),
            format!("put device_model_override=\"/usr/bin/{NAME}\" into the guest's configuration"),
        )
    })?;
    if after("-machine").chain(after("-M")).any(|machine| !machine.starts_with("xenpv")) {
        return Err(Failure::input(
            format!("domain {guest} needs a machine emulated, and {NAME} emulates none"),
            "leave device_model_override out, or make it a PV or PVH guest",
        ));
    }
    let mut sockets = Vec::new();
    for options in after("-chardev").filter_map(|chardev| chardev.strip_prefix("socket,")) {
        let mut parts = options.split(',');
        match parts.find_map(|part| part.strip_prefix("path=")) {
            Some(path) => sockets.push(path.into()),
            None => {
                return Err(Failure::input(
                    format!("{NAME} cannot take over an open QMP socket ({options})"),
                    "leave dm_restrict out of the guest's configuration",
                ));
            }
        }
    }
    Ok(Args { guest, sockets })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(text: &str) -> Result<Args, Failure> {
        parse(&text.split(' ').map(String::from).collect::<Vec<_>>())
    }

    #[test]
    fn what_xl_says_to_a_device_model() {
        let args = args(
            "-xen-domid 7 -no-shutdown -chardev socket,id=libxl-cmd,path=/run/xen/qmp-libxl-7,\
             server=on,wait=off -mon chardev=libxl-cmd,mode=control -chardev \
             socket,id=libxenstat-cmd,path=/run/xen/qmp-libxenstat-7,server=on,wait=off \
             -nodefaults -no-user-config -xen-attach -name g -machine xenpv -m 256",
        );
        let sockets = ["/run/xen/qmp-libxl-7", "/run/xen/qmp-libxenstat-7"];
        let sockets = sockets.into_iter().map(PathBuf::from).collect();
        assert_eq!(args.unwrap(), Args { guest: DomId(7), sockets });
    }

    #[test]
    fn what_it_cannot_be() {
        for (bad, word) in [
            ("--version", "-xen-domid"),
            ("-xen-domid 7 -machine pc-i440fx-3.1,accel=xen", "emulate"),
            ("-xen-domid 7 -chardev socket,id=libxl-cmd,fd=9,server=on", "dm_restrict"),
        ] {
            let failure = args(bad).unwrap_err();
            assert!(failure.to_string().contains(word), "{failure}");
        }
    }
}
