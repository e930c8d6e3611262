//! Paths that are not UTF-8.

use super::*;

/// Paths are bytes: those of images, and those that they name.
#[test]
fn image_references_with_non_utf8_paths_are_served() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let tenants = Tenants::new();
    let name = |bytes: &[u8]| tenants.own.join(OsStr::from_bytes(bytes));
    let serve = |format: &str, path: &Path, options: &str| {
        let params =
            [format.as_bytes(), b":", options.as_bytes(), path.as_os_str().as_bytes()].concat();
        Machine::new().disk(&params, Mode::ReadWrite)
    };
    let (base, image) = (name(b"b\xff\x80.img"), name(b"a\xc3.qcow2"));
    fs::write(&base, vec![5; SIZE]).unwrap();
    let create = |options: &[&OsStr]| {
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2"]).args(options).arg(&image).arg("1M");
        assert!(command.status().unwrap().success());
    };
    create(
        &["-F", "raw", "-b"]
            .map(OsStr::new)
            .into_iter()
            .chain([base.as_os_str()])
            .collect::<Vec<_>>(),
    );
    // Unknown autoclear features, which a writer clears; the library rewrites the header for that.
    let mut bytes = fs::read(&image).unwrap();
    bytes[95] |= 4;
    fs::write(&image, &bytes).unwrap();
    let mut guest = serve("qcow2", &image, "");
    assert_eq!(guest.one(Deed::Read(0, 1)), [5; 512]);
    guest.one(Deed::Write(8, vec![6; 512]));
    guest.close();
    let after = fs::read(&image).unwrap();
    let named = |bytes: &[u8]| {
        let base = base.as_os_str().as_bytes();
        bytes.windows(base.len()).filter(|window| *window == base).count()
    };
    assert_eq!((named(&bytes), named(&after), after[95]), (1, 1, 0));
    let compared = Command::new("qemu-img").args(["check", "-q"]).arg(&image).status().unwrap();
    assert!(compared.success());
    let mut guest = serve("qcow2", &image, "[ro]");
    assert_eq!(guest.one(Deed::Read(8, 1)), [6; 512]);
    guest.close();
    // A data file, an extent, a trace, a root.
    let data = name(b"d\xfe.raw");
    let option = [OsStr::new("data_file="), data.as_os_str()].map(OsStr::as_bytes).concat();
    fs::remove_file(&image).unwrap();
    create(&[OsStr::new("-o"), &std::ffi::OsString::from_vec(option)]);
    let mut guest = serve("qcow2", &image, "[ro]");
    assert_eq!(guest.one(Deed::Read(0, 1)), [0; 512]);
    guest.close();
    let (descriptor, extent) = (name(b"v\xfd.vmdk"), name(b"v\xfd-flat.vmdk"));
    fs::write(&extent, vec![8; SIZE]).unwrap();
    vmdk(&descriptor, "FLAT", extent.file_name().unwrap().as_bytes());
    let traces = name(b"t\xfc");
    fs::create_dir(&traces).unwrap();
    let mut disk = Disk::from_bytes(descriptor.as_os_str().as_bytes()).unwrap();
    disk.options.trace = Some(traces.clone());
    disk.options.image_roots = Some(vec![traces.clone()]);
    let mut guest = serve("vmdk", &descriptor, &format!("[{}]", disk.options));
    assert_eq!(guest.one(Deed::Read(0, 1)), [8; 512]);
    guest.one(Deed::Write(0, vec![9; 512]));
    guest.close();
    assert_eq!(fs::read(&extent).unwrap()[..513], [&[9; 512][..], &[8]].concat());
    assert_eq!(fs::read_dir(&traces).unwrap().count(), 1);
    // Errors are still reported.
    let error = Image::open_as(&Disk::from_bytes(b"/none/\xff.img").unwrap()).unwrap_err();
    assert_eq!(error.code(), "image-missing");
}
