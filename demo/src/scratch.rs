//! A check that an image is blank and may be overwritten.

use crate::contents;
use pvio_daemon::failure::Failure;
use pvio_storage::image::{Disk, Format, Image, Spec};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const PART: usize = 1 << 20;

/// Returns whether writes to a disk go to a temporary overlay.
#[must_use]
pub fn is_overlay(disk: &Disk) -> bool {
    matches!(disk.storage_spec(), Spec::Overlay(_))
}

/// Fails unless every byte of the disk is zero. Holes of a raw image are not read.
///
/// # Errors
/// A [`Failure`] that names the contents of the image.
pub fn must_be_blank(disk: &Disk, image: Image) -> Result<(), Failure> {
    if let Spec::File { format: Format::Raw, path, .. } = &disk.spec {
        return raw_must_be_blank(path);
    }
    let name = &disk.spec;
    let first = image.first_data();
    match first.map_err(|e| {
        Failure::new(format!("disk image {name} cannot be read: {e}"), "").as_input()
    })? {
        None => Ok(()),
        Some(offset) => Err(Failure::input(
            format!("{name} cannot be overwritten: it holds data (first at byte {offset})"),
            format!("use an empty one or [overlay]{name}, or destroy its data with --overwrite"),
        )),
    }
}

fn raw_must_be_blank(path: &Path) -> Result<(), Failure> {
    let failed = |e| {
        Failure::new(format!("disk image {} cannot be read: {e}", path.display()), "").as_input()
    };
    let file = File::open(path).map_err(failed)?;
    let Some(offset) = first_data(&file).map_err(failed)? else { return Ok(()) };
    let holds = identify_contents(&file).unwrap_or("data");
    Err(Failure::input(
        format!(
            "{} cannot be overwritten: it holds {holds} (first at byte {offset})",
            path.display()
        ),
        format!(
            "use an empty scratch image, or destroy the data in {} with --overwrite",
            path.display()
        ),
    ))
}

/// Returns the offset of the first byte that is not zero.
fn first_data(file: &File) -> std::io::Result<Option<u64>> {
    let mut part = vec![0; PART];
    let mut at = 0;
    loop {
        at = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => return Ok(None),
            // Block devices do not support SEEK_DATA.
            Err(Errno::INVAL) => at,
            Err(e) => return Err(e.into()),
        };
        let got = file.read_at(&mut part, at)?;
        if got == 0 {
            return Ok(None);
        }
        if let Some(first) = part[..got].iter().position(|b| *b != 0) {
            return Ok(Some(at + first as u64));
        }
        at += got as u64;
    }
}

/// Returns a description of the contents, if their signature is known.
fn identify_contents(file: &File) -> Option<&'static str> {
    let mut head = vec![0; contents::HEAD];
    let got = file.read_at(&mut head, 0).ok()?;
    contents::of(&head[..got]).map(|found| found.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn image(len: u64, data: &[(u64, &[u8])]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        for (at, bytes) in data {
            file.as_file().write_all_at(bytes, *at).unwrap();
        }
        file.as_file().flush().unwrap();
        file
    }

    #[test]
    fn image_of_zeroes_and_holes_is_blank() {
        raw_must_be_blank(image(8 << 20, &[]).path()).unwrap();
        raw_must_be_blank(image(8 << 20, &[(3 << 20, &[0; 10_000])]).path()).unwrap();
    }

    #[test]
    fn image_with_data_is_rejected_naming_its_content() {
        let says = |at, bytes: &[u8]| {
            raw_must_be_blank(image(8 << 20, &[(at, bytes)]).path()).unwrap_err()
        };
        assert!(says(1080, &[0x53, 0xef]).what.contains("ext2/3/4"));
        assert!(says(510, &[0x55, 0xaa]).what.contains("MBR"));
        let failure = says((8 << 20) - 1, &[1]);
        assert!(failure.what.contains("holds data (first at byte 8388607)"), "{failure}");
        assert!(failure.remedy.contains("--overwrite"));
    }
}
