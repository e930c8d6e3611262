//! Initramfs archives: the `newc` format of `cpio`, as specified in the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst`.
//!
//! A file may consist of several archives; the kernel unpacks them in order.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};

const DIRECTORY: u32 = 0o040_755;
const SYMLINK: u32 = 0o120_777;
const PROGRAM: u32 = 0o100_755;

/// An archive that is being written. Parent directories are created as needed.
pub struct Archive<W: Write> {
    out: W,
    inode: u32,
    written: u64,
    folders: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    /// Returns an empty archive.
    pub fn new(out: W) -> Self {
        Self { out, inode: 1, written: 0, folders: BTreeSet::new() }
    }

    /// Adds a directory and its parents. Paths are relative to the root, without a leading slash.
    pub fn folder(&mut self, path: &str) -> io::Result<()> {
        let path = path.trim_matches('/');
        if path.is_empty() || self.folders.contains(path) {
            return Ok(());
        }
        self.parent(path)?;
        self.entry(path, DIRECTORY, &[])?;
        self.folders.insert(path.to_owned());
        Ok(())
    }

    /// Adds a file with these bytes, which everyone may read and execute.
    pub fn file(&mut self, path: &str, bytes: &[u8]) -> io::Result<()> {
        self.parent(path)?;
        self.entry(path, PROGRAM, bytes)
    }

    /// Adds a copy of a file of the host; follows symlinks.
    pub fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let bytes = fs::read(from).with_context(|| format!("read {}", from.display()))?;
        Ok(self.file(path, &bytes)?)
    }

    /// Adds a symlink.
    pub fn link(&mut self, path: &str, to: &str) -> io::Result<()> {
        self.parent(path)?;
        self.entry(path, SYMLINK, to.as_bytes())
    }

    /// Ends the archive, padded so that another one may follow.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.pad(512)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn parent(&mut self, path: &str) -> io::Result<()> {
        path.rsplit_once('/').map_or(Ok(()), |(parent, _)| self.folder(parent))
    }

    fn entry(&mut self, path: &str, mode: u32, bytes: &[u8]) -> io::Result<()> {
        let too_big = |_| io::Error::new(io::ErrorKind::InvalidInput, "no room for 4 GiB");
        let size = u32::try_from(bytes.len()).map_err(too_big)?;
        let name = u32::try_from(path.len() + 1).map_err(too_big)?;
        // Fields: ino mode uid gid nlink mtime size devmajor devminor rdevmajor rdevminor namesize
        // check.
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name, 0];
        self.inode += 1;
        let mut header = String::from("070701");
        for field in fields {
            header += &format!("{field:08x}");
        }
        self.write(header.as_bytes())?;
        self.write(path.as_bytes())?;
        self.write(&[0])?;
        self.pad(4)?;
        self.write(bytes)?;
        self.pad(4)
    }

    fn pad(&mut self, boundary: u64) -> io::Result<()> {
        while !self.written.is_multiple_of(boundary) {
            self.write(&[0])?;
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parses names, modes and sizes, field by field.
    fn listed(mut bytes: &[u8]) -> Vec<(String, u32, u32)> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |i: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * i..14 + 8 * i]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, name) = (field(1), field(6), field(11) as usize);
            let path = String::from_utf8(bytes[110..110 + name - 1].to_vec()).unwrap();
            if path == "TRAILER!!!" {
                return entries;
            }
            entries.push((path, mode, size));
            let data = (110 + name).next_multiple_of(4);
            bytes = &bytes[(data + size as usize).next_multiple_of(4)..];
        }
    }

    #[test]
    fn cpio_archive_lists_written_entries() {
        let mut archive = Archive::new(Vec::new());
        archive.file("usr/bin/a", b"12345").unwrap();
        archive.file("usr/bin/b", b"").unwrap();
        archive.link("bin", "usr/bin").unwrap();
        let bytes = archive.finish().unwrap();
        assert!(bytes.len().is_multiple_of(512));
        let expected = [
            ("usr", DIRECTORY, 0),
            ("usr/bin", DIRECTORY, 0),
            ("usr/bin/a", PROGRAM, 5),
            ("usr/bin/b", PROGRAM, 0),
            ("bin", SYMLINK, 7),
        ];
        assert_eq!(listed(&bytes), expected.map(|(path, mode, n)| (path.to_owned(), mode, n)));
    }
}
