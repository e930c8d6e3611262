//! The demo image: a small FAT volume with a few pages. Its bytes are always the same.

use fatfs::{Date, DateTime, FileSystem, FormatVolumeOptions, FsOptions, Time, TimeProvider};
use rand_pcg::Pcg64Mcg;
use rand_pcg::rand_core::{Rng, SeedableRng};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::io::{self, Cursor, Read, Seek, Write};

/// Size in bytes of the image that `pvio run` creates.
pub const SIZE: u64 = 32 << 20;
/// Size in bytes of the largest file in it.
pub const NOISE_SIZE: usize = 4 << 20;

/// A file of the image.
#[derive(Debug, Clone)]
pub struct DemoFile {
    /// The path, without a leading slash.
    pub path: &'static str,
    /// The contents.
    pub bytes: Vec<u8>,
}

/// Returns the files, in the order in which they are written.
#[must_use]
pub fn files() -> Vec<DemoFile> {
    let mut noise = vec![0; NOISE_SIZE];
    Pcg64Mcg::seed_from_u64(0x7076_696f).fill_bytes(&mut noise);
    let file = |path, bytes: &[u8]| DemoFile { path, bytes: bytes.to_vec() };
    let mut files = vec![
        file("index.html", include_bytes!("index.html")),
        file("hello.txt", include_bytes!("hello.txt")),
        file("docs/path.svg", include_bytes!("path.svg")),
        file("docs/try.md", include_bytes!("try.md")),
        file("data/noise.bin", &noise),
    ];
    let mut sums = String::new();
    for DemoFile { path, bytes } in &files {
        let mut hex = String::new();
        for byte in Sha256::digest(bytes) {
            let _ = write!(hex, "{byte:02x}");
        }
        let _ = writeln!(sums, "{hex}  {path}");
    }
    files.push(file("SHA256SUMS", sums.as_bytes()));
    files
}

/// Creates the file system in `disk`, which has the size of the volume.
///
/// # Errors
/// An error of `disk`.
pub fn write_image<T: Read + Write + Seek>(disk: &mut T) -> io::Result<()> {
    let options = FormatVolumeOptions::new().volume_id(0x7076_696f).volume_label(*b"PVIO DEMO  ");
    fatfs::format_volume(&mut *disk, options)?;
    disk.rewind()?;
    let fs = FileSystem::new(disk, FsOptions::new().time_provider(&FixedTime))?;
    {
        let root = fs.root_dir();
        root.create_dir("docs")?;
        root.create_dir("data")?;
        for DemoFile { path, bytes } in files() {
            root.create_file(path)?.write_all(&bytes)?;
        }
    }
    fs.unmount()
}

/// Returns the image's bytes.
///
/// # Errors
/// `size` bytes are too few for the files.
pub fn image_bytes(size: usize) -> io::Result<Vec<u8>> {
    let mut disk = Cursor::new(vec![0; size]);
    write_image(&mut disk)?;
    Ok(disk.into_inner())
}

/// A constant timestamp, so that every image has the same bytes.
#[derive(Debug)]
struct FixedTime;

impl TimeProvider for FixedTime {
    fn get_current_date(&self) -> Date {
        Date { year: 2026, month: 1, day: 1 }
    }

    fn get_current_date_time(&self) -> DateTime {
        let time = Time { hour: 12, min: 0, sec: 0, millis: 0 };
        DateTime { date: self.get_current_date(), time }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn demo_image_is_reproducible() {
        assert!(image_bytes(8 << 20).unwrap() == image_bytes(8 << 20).unwrap());
    }

    #[test]
    fn demo_image_files_read_back() {
        let mut disk = Cursor::new(image_bytes(SIZE as usize).unwrap());
        let fs = FileSystem::new(&mut disk, FsOptions::new()).unwrap();
        for DemoFile { path, bytes } in files() {
            let mut read = Vec::new();
            fs.root_dir().open_file(path).unwrap().read_to_end(&mut read).unwrap();
            assert!(read == bytes, "{path}");
        }
    }
}
