//! Locks of files that were opened by another process.

use crate::confined::Confined;
use crate::support::{has, text, tool};
use crate::{contents, resolved, when_free};
use pvio_storage::image::{Disk, HandedFiles, Image};
use std::fs;

fn code(disk: &Disk) -> &'static str {
    Image::open_as(disk).map(drop).map_err(|error| error.code()).err().unwrap_or("opened")
}

#[test]
fn lock_passes_with_descriptors_and_survives_device_process() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (base, image) = (dir.path().join("base.img"), dir.path().join("a.qcow2"));
    fs::write(&base, vec![3; 1 << 20]).unwrap();
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.img", text(&image)]);
    let disk: Disk = format!("[rw]qcow2:{}", text(&image)).parse().unwrap();
    let written: Disk = format!("[rw]raw:{}", text(&base)).parse().unwrap();
    let read: Disk = format!("[ro]raw:{}", text(&base)).parse().unwrap();
    let taken = || {
        assert_eq!(code(&disk), "image-busy");
        assert_eq!(code(&written), "image-busy", "the backing file");
        assert_eq!(code(&read), "opened", "the backing file is shared among readers");
        let written = ["-f", "qcow2", "-c", "write 0 64k", text(&image)];
        let status = std::process::Command::new("qemu-io")
            .args(written)
            .stderr(std::process::Stdio::null())
            .status();
        assert!(!status.unwrap().success(), "QEMU's tools see the lock");
    };
    let (named, resolved) = resolved(&disk);
    taken();
    let kept: HandedFiles = named.lasting().with(resolved.files.lasting());
    let first = Confined::start(&disk, &named, &resolved);
    assert_eq!(first.opened(), Ok(()));
    taken();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&first.kill()), Some(9));
    taken();

    // The successor serves from the same descriptions. The image was not closed.
    let second = Confined::start(&disk, &named, &resolved);
    assert_eq!(second.opened(), Ok(()));
    drop((kept, named, resolved));
    taken();
    second.proceed();
    let outcome = second.finish();
    assert!(outcome.before == vec![3; 1 << 20] && outcome.after != outcome.before);
    drop(when_free(|| Image::open_as(&disk)));
    drop(when_free(|| Image::open_as(&written)));
    assert!(contents(&format!("qcow2:{}", text(&image))) == outcome.after);
    tool("qemu-img", &["check", "-q", text(&image)]);
}

#[test]
fn named_file_in_use_is_busy() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.img");
    fs::write(&image, vec![3; 1 << 20]).unwrap();
    let disk: Disk = format!("[rw]raw:{}", text(&image)).parse().unwrap();
    let named = HandedFiles::open_named(&disk).unwrap();
    assert_eq!(HandedFiles::open_named(&disk).unwrap_err().code(), "image-busy");
    drop(named);
    HandedFiles::open_named(&disk).unwrap();
    let relative: Disk = "raw:a.img".parse().unwrap();
    assert_eq!(HandedFiles::open_named(&relative).unwrap_err().code(), "image-error");
}
