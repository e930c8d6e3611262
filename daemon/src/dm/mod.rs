//! Replacement of the device model that `xl` starts for a guest with `qdisk` disks.
//!
//! `xl` leaves `qdisk` images to a program that it starts for the guest, usually QEMU. A guest with
//! `device_model_override="/usr/bin/pvio-dm"` in its configuration, where `pvio-dm` is a link to
//! `pvio`, has its images served by a pvio process instead. There is one process for each guest; it
//! ends with the guest. It does not need `pvio serve`, and Linux's own backends may be loaded.
//!
//! The program is called as QEMU is. It reads two of the arguments: the domain (`-xen-domid`) and
//! the QMP sockets (`-chardev socket,…`), over which `xl` only sends status queries.
//! `device_model_args` in the guest's configuration may contain pvio's own `--image-root`. When it
//! serves, it writes `running` to `device-model/<domid>/state`.

mod qmp;

use crate::control;
use crate::disks::args::ImageRootArgs;
use crate::driver::{self, Options, XenstoreLink};
use crate::failure::Failure;
use crate::lock::{Scope, ServiceLock};
use crate::serve;
use crate::served::Served;
use crate::startup;
use crate::stop::{Stop, Wakeup};
use pvio_blkback::{Config, Policy};
use pvio_grant_table::DomId;
use pvio_storage::image::DiskOptions;
use pvio_xenbus::handshake::common::{BackendKind, announce_device_model};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Name under which `pvio` is a device model.
pub const NAME: &str = "pvio-dm";

/// The device model's arguments that pvio uses.
#[derive(Debug, PartialEq, Eq)]
struct Args {
    guest: DomId,
    sockets: Vec<PathBuf>,
    image_roots: ImageRootArgs,
}

/// Serves a guest's `qdisk` disks until it is stopped, as `xl` expects of a device model.
///
/// # Errors
/// A [`Failure`], which `xl` shows from the guest's `qemu-dm-….log`.
pub fn run(args: impl Iterator<Item = OsString>) -> Result<(), Failure> {
    let args = parse(&args.collect::<Vec<_>>())?;
    startup::prepare()?;
    let mut disk_options = DiskOptions::default();
    args.image_roots.add_to(&mut disk_options)?;
    serve::log_to(None)?;
    let wakeup = Wakeup::new()?;
    let stop = Stop::on_signal(wakeup.clone())?;
    let host = serve::Host::open()?;
    let folder = Path::new(control::FOLDER);
    let _lock = ServiceLock::take(folder, &[BackendKind::Qdisk], Scope::OneGuest)?;
    let mut xs = XenstoreLink::reconnecting(host.xenstore()?, || host.domain().xenstore());
    for socket in &args.sockets {
        qmp::listen(socket)?;
    }
    let options = Options {
        kinds: vec![BackendKind::Qdisk],
        only: Some(args.guest),
        disk_options,
        disks: Config { policy: Policy::PersistentOrCopy, ..Config::for_this_machine() },
        ..Options::default()
    };
    // libxl waits for this value and expects the guest's disks to be served from then on.
    let mut announcer = host.xenstore()?;
    let mut announced = Ok(());
    let served = driver::run(
        (host.domain(), host.id()),
        &mut xs,
        &options,
        &Served::default(),
        (&stop, &wakeup),
        || {
            announced = announce_device_model(&mut announcer, args.guest);
        },
    );
    announced.map_err(Failure::of)?;
    served.map_err(serve::xenstore_lost)
}

fn parse(args: &[OsString]) -> Result<Args, Failure> {
    let after = |flag: &'static str| {
        args.windows(2).filter(move |pair| pair[0] == flag).map(|pair| pair[1].as_bytes())
    };
    let text = |word| std::str::from_utf8(word).ok();
    let guest = after("-xen-domid").next().and_then(text).and_then(|id| id.parse().ok());
    let guest = guest.map(DomId).ok_or_else(|| {
        Failure::input(
            format!("{NAME} cannot be started without -xen-domid: xl starts it"),
            format!("write device_model_override=\"/usr/bin/{NAME}\" in the guest's configuration"),
        )
    })?;
    if after("-machine").chain(after("-M")).any(|machine| !machine.starts_with(b"xenpv")) {
        return Err(Failure::input(
            format!("domain {guest} needs an emulated machine, which {NAME} does not support"),
            "leave device_model_override out, or configure a PV or PVH guest",
        ));
    }
    let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
    let mut sockets = Vec::new();
    for options in after("-chardev").filter_map(|chardev| chardev.strip_prefix(b"socket,")) {
        let mut parts = options.split(|byte| *byte == b',');
        match parts.find_map(|part| part.strip_prefix(b"path=")) {
            Some(socket) => sockets.push(path(socket)),
            None => {
                let options = String::from_utf8_lossy(options);
                return Err(Failure::input(
                    format!(
                        "an open QMP socket cannot be used: not supported by {NAME} ({options})"
                    ),
                    "leave dm_restrict out of the guest's configuration",
                ));
            }
        }
    }
    let image_roots = ImageRootArgs { roots: after("--image-root").map(path).collect() };
    Ok(Args { guest, sockets, image_roots })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(text: &str) -> Result<Args, Failure> {
        parse(&text.split(' ').map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn device_model_command_line_of_xl_is_parsed() {
        let args = args(
            "-xen-domid 7 -no-shutdown -chardev socket,id=libxl-cmd,path=/run/xen/qmp-libxl-7,\
             server=on,wait=off -mon chardev=libxl-cmd,mode=control -chardev \
             socket,id=libxenstat-cmd,path=/run/xen/qmp-libxenstat-7,server=on,wait=off \
             -nodefaults -no-user-config -xen-attach -name g -machine xenpv -m 256 \
             --image-root /srv/base --image-root /srv/iso",
        );
        let sockets = ["/run/xen/qmp-libxl-7", "/run/xen/qmp-libxenstat-7"];
        let sockets = sockets.into_iter().map(PathBuf::from).collect();
        let roots = ["/srv/base", "/srv/iso"].map(PathBuf::from).into();
        let image_roots = ImageRootArgs { roots };
        assert_eq!(args.unwrap(), Args { guest: DomId(7), sockets, image_roots });
    }

    #[test]
    fn unsupported_device_model_command_line_is_rejected() {
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
