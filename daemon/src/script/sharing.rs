//! Checks whether a disk's image may be served while it is in use.

use crate::failure::Failure;
use pvio_grant_table::DomId;
use pvio_storage::image::inspect::inspect;
use pvio_storage::image::{Disk, EscapedPath, LockState, Spec};
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr, DeviceClass, list_backends};
use pvio_xenbus::handshake::vbd::{Mode, ToolstackBack};
use pvio_xenbus::{Xenstore, XsError};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A domain, and the VM that it belongs to, if that is known.
type Holder = (DomId, Option<Vec<u8>>);

/// Checks that the image of a disk is not in use, or only by a domain of the same VM. During a
/// migration, or a save and restore, the old domain ends only after the new one has its disk; the
/// daemon waits for that. Linux's script does the same check (`same_vm`).
///
/// # Errors
/// A [`Failure`] that names the domain that uses the image.
pub fn check(
    xs: &mut dyn Xenstore,
    base: &str,
    config: &ToolstackBack,
    disk: &Disk,
) -> Result<(), Failure> {
    let Some(image) = disk.spec.path() else { return Ok(()) };
    let read_only = config.mode == Mode::ReadOnly || disk.options.read_only == Some(true);
    if !is_in_use(&disk.spec, read_only) {
        return Ok(());
    }
    let own_vm = vm(xs, config.frontend_id).map_err(Failure::of)?;
    let mut holders = holders(xs, base, image).map_err(Failure::of)?;
    // A domain that is already destroyed has no VM, and releases the image within moments.
    holders.retain(|(_, theirs)| theirs.is_some());
    match holders.iter().find(|(_, theirs)| *theirs != own_vm) {
        Some((other, _)) => Err(Failure::input(
            format!("disk image {} is in use by domain {other}", EscapedPath::new(image)),
            "shut that domain down or detach its disk, or attach both disks read-only",
        )),
        None if holders.is_empty() => Err(Failure::input(
            format!("disk image {} is in use by another program", EscapedPath::new(image)),
            "find that program with lsof or fuser",
        )),
        None => Ok(()),
    }
}

fn is_in_use(spec: &Spec, read_only: bool) -> bool {
    // The daemon reports images that cannot be read.
    let state = inspect(spec).ok().and_then(|found| found.files.first().map(|file| file.lock));
    match state {
        Some(LockState::Written) => true,
        Some(LockState::Read) => !read_only,
        Some(LockState::Free) | None => false,
    }
}

/// Returns the other domains that have a disk with the same image, and their VMs.
fn holders(xs: &mut dyn Xenstore, base: &str, image: &Path) -> Result<Vec<Holder>, XsError> {
    let own = xs.read_opt("domid")?.and_then(|id| String::from_utf8(id).ok()?.parse().ok());
    let own_domain = DomId(own.unwrap_or_default());
    let own_device = DeviceAddr::from_backend_path(base, own_domain).map(|(addr, _)| addr);
    let mut found = Vec::new();
    for kind in BackendKind::ALL.into_iter().filter(|kind| kind.class() == DeviceClass::Vbd) {
        for addr in list_backends(xs, kind, own_domain)? {
            let Ok(config) = ToolstackBack::read(xs, &addr.backend_path()) else { continue };
            let same = |disk: Disk| disk.spec.path().is_some_and(|path| is_same(path, image));
            if Some(addr) != own_device && super::configured_disk(&config).is_ok_and(same) {
                found.push((addr.front, vm(xs, addr.front)?));
            }
        }
    }
    Ok(found)
}

fn is_same(one: &Path, other: &Path) -> bool {
    let place = |path: &Path| std::fs::metadata(path).map(|file| (file.dev(), file.ino()));
    one == other || matches!((place(one), place(other)), (Ok(one), Ok(other)) if one == other)
}

/// Returns the VM that a domain belongs to: `/vm/UUID`.
fn vm(xs: &mut dyn Xenstore, domain: DomId) -> Result<Option<Vec<u8>>, XsError> {
    xs.read_opt(&format!("/local/domain/{domain}/vm"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pvio_hosted::{DomainConfig, Hypervisor};
    use pvio_storage::image::{Image, ImageOptions};
    use pvio_xenbus::handshake::vbd::{OWN_KIND, create_device};

    #[test]
    fn image_in_use_is_rejected_unless_by_same_vm() {
        let dir = tempfile::tempdir().unwrap();
        let hypervisor = Hypervisor::start(dir.path()).unwrap();
        let domain = |name| hypervisor.create_domain(DomainConfig::new(name)).unwrap();
        let [old, new, other] = ["old", "new", "other"].map(domain);
        let mut xs = hypervisor.xenstore().unwrap();
        for (domain, uuid) in [(old, "a"), (new, "a"), (other, "b")] {
            let path = format!("/local/domain/{domain}/vm");
            xs.write(&path, format!("/vm/{uuid}").as_bytes()).unwrap();
        }
        let image = dir.path().join("disk.img");
        std::fs::write(&image, [0; 4096]).unwrap();
        let mut check_image = |front| {
            let addr = DeviceAddr::new(BackendKind::Vbd, DomId::DOM0, front, 51712);
            let mut config = ToolstackBack::new(addr, image.to_str().unwrap());
            config.kind = OWN_KIND.into();
            // Fails if the nodes exist from an earlier call, which does no harm.
            let _ = create_device(&mut xs, addr, &config);
            let disk = crate::script::configured_disk(&config).unwrap();
            check(&mut xs, &addr.backend_path(), &config, &disk).map_err(|e| e.to_string())
        };
        let options = ImageOptions { read_only: false, direct: false };
        let mut held = Some(Image::open(&image, options).unwrap());
        let why = check_image(new).unwrap_err();
        assert!(why.contains("another program"), "{why}");
        held.take();
        assert_eq!(check_image(old), Ok(()));
        held = Some(Image::open(&image, options).unwrap());
        assert_eq!(check_image(new), Ok(()), "the same VM, as in a migration");
        let why = check_image(other).unwrap_err();
        assert!(why.contains(&format!("in use by domain {old}")), "{why}");
        drop(held);
        assert_eq!(check_image(other), Ok(()));
    }
}
