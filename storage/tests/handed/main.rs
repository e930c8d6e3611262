//! Disks that are served by a process that can open nothing, from descriptors that were opened
//! elsewhere. A filter kills the process at the first system call that it must not make.

#[path = "../support/mod.rs"]
mod support;

mod confined;
mod formats;
mod locks;
mod messages;
mod servers;

use pvio_storage::image::{
    Disk, DiskDescription, HandedFiles, Image, ImageError, Resolved, resolve,
};
use std::time::{Duration, Instant};

/// Opens a disk as soon as it is free. The kernel releases the io_uring of a process that has ended,
/// and with it the lock of the file, some time afterwards.
fn when_free<T>(open: impl Fn() -> Result<T, ImageError>) -> T {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        match open() {
            Err(ImageError::Busy(_)) if Instant::now() < end => {}
            opened => return opened.unwrap(),
        }
    }
}

/// Opens what a disk names and what its images name, as the supervisor and the image helper do, and
/// passes the description through its serialized form.
fn resolved(disk: &Disk) -> (HandedFiles, Resolved) {
    let named = when_free(|| HandedFiles::open_named(disk));
    let resolved = resolve(disk, &named).unwrap();
    let sent = serde_json::to_string(&resolved.description()).unwrap();
    let description: DiskDescription = serde_json::from_str(&sent).unwrap();
    assert_eq!(description, resolved.description());
    let descriptors = resolved.files.descriptors();
    let descriptors = descriptors.map(|fd| fd.try_clone_to_owned().unwrap()).collect();
    let resolved = Resolved::new(disk, description, descriptors).unwrap();
    (named, resolved)
}

/// Returns a disk's contents, read by this process from files that it opens.
fn contents(disk: &str) -> Vec<u8> {
    let disk: Disk = format!("[ro]{disk}").parse().unwrap();
    let image = when_free(|| Image::open_as(&disk));
    confined::read_all(&mut image.engine(1).unwrap())
}
