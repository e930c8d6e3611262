//! Block devices that an image or a link in a root names.

use super::*;

/// A loop device over a file; detached when it is dropped.
struct Loop(String);

impl Loop {
    fn over(file: &Path) -> Option<Self> {
        if !has("losetup", "mount") {
            return None;
        }
        let made = Command::new("losetup").args(["--find", "--show", text(file)]).output().unwrap();
        if !made.status.success() {
            println!("SKIPPED: no loop device; run as root, with /dev/loop-control");
            return None;
        }
        Some(Self(String::from_utf8(made.stdout).unwrap().trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn symlink_below_root_to_block_device_is_followed() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let tenants = Tenants::new();
    let Some(device) = Loop::over(&tenants.other.join("base.img")) else { return };
    let image = tenants.own.join("a.qcow2");
    symlink(&device.0, tenants.own.join("volume")).unwrap();
    symlink("volume", tenants.own.join("again")).unwrap();
    for name in ["volume", "again"] {
        qcow2(&image, "raw", name);
        assert_eq!(first_sector(&format!("qcow2:{}", text(&image))), [2; 512], "{name}");
    }
    // By its own path it does not belong to the tenant, nor through a link to the directory of all
    // devices.
    symlink("/dev", tenants.own.join("dev")).unwrap();
    for name in [device.0.clone(), format!("dev/{}", &device.0[5..])] {
        qcow2(&image, "raw", &name);
        refused_as(&format!("qcow2:{}", text(&image)), "image-outside-root", &[&name]);
    }
    // Written, because the name derives from the descriptor's name.
    let descriptor = tenants.own.join("a.vmdk");
    symlink(&device.0, tenants.own.join("a-flat.vmdk")).unwrap();
    vmdk(&descriptor, "FLAT", b"a-flat.vmdk");
    open(&format!("[rw]{}", text(&descriptor))).unwrap();
}

/// The directory of an image on a block device contains the disks of all guests.
#[test]
fn image_on_block_device_may_not_reference_other_device() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let tenants = Tenants::new();
    let Some(other) = Loop::over(&tenants.other.join("base.img")) else { return };
    let image = tenants.own.join("a.qcow2");
    for name in [&other.0, &other.0[5..]] {
        qcow2(&image, "raw", name);
        fs::File::options().write(true).open(&image).unwrap().set_len(1 << 20).unwrap();
        let Some(device) = Loop::over(&image) else { return };
        let spec = format!("qcow2:{}", device.0);
        refused_as(&spec, "image-outside-root", &[&device.0, name, "there is none"]);
        assert_eq!(first_sector(&format!("[image-root=/dev]{spec}")), [2; 512], "{name}");
    }
}
