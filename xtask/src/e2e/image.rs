//! A directory of unusual files, and disk images with its files.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::{exec, tools};

const QUICK: Duration = Duration::from_secs(60);
/// Size of the big file in bytes: 32 MiB and an odd remainder.
const BIG: usize = (32 << 20) + 12_345;

/// A SHA-256 sum.
pub type Sum = [u8; 32];

/// A file's path relative to the directory, and its checksum.
pub struct Entry {
    /// The path, without a leading slash.
    pub path: String,
    /// The checksum of its contents.
    pub sum: Sum,
}

/// Creates the directory: many small files, nested directories, a big file, names that must be
/// escaped, an empty file. Unless it is for FAT, also symlinks, and a name with a character above
/// U+FFFF, which mtools would shorten.
pub fn folder(at: &Path, fat: bool) -> Result<()> {
    for i in 0..240_u32 {
        let dir = at.join(format!("many/{}/{}", i % 4, i % 7));
        fs::create_dir_all(&dir)?;
        // Sizes from 0 to 23 KiB, across all block boundaries.
        noise(&dir.join(format!("file-{i:03}.bin")), (i as usize * 97) % 23_900, u64::from(i))?;
    }
    let deep = at.join("a/b/c/d/e/f/g/h");
    fs::create_dir_all(&deep)?;
    fs::write(deep.join("deep.txt"), "eight folders down\n")?;
    fs::write(at.join("a name with blanks.txt"), "blanks\n")?;
    fs::write(at.join("100% 50%25.txt"), "percent\n")?;
    fs::write(at.join("grüße-日本語.txt"), "unicode\n")?;
    fs::write(at.join("plus+and&hash#;=.txt"), "reserved in a URL\n")?;
    fs::write(at.join("empty"), "")?;
    noise(&at.join("big.bin"), BIG, 0xb16)?;
    if !fat {
        fs::write(at.join("😀.txt"), "more unicode\n")?;
        symlink("a/b/c/d/e/f/g/h/deep.txt", at.join("link.txt"))?;
        symlink("../../big.bin", at.join("a/b/link-to-big"))?;
    }
    Ok(())
}

/// Writes reproducible pseudorandom data (xorshift64).
pub fn noise(file: &Path, bytes: usize, seed: u64) -> Result<()> {
    let mut out = BufWriter::new(File::create(file)?);
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut left = bytes;
    while left > 0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let word = state.to_le_bytes();
        let take = left.min(word.len());
        out.write_all(&word[..take])?;
        left -= take;
    }
    Ok(out.flush()?)
}

/// Returns all files below a directory, sorted; follows symlinks.
pub fn entries(folder: &Path) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    collect(folder, folder, &mut entries)?;
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(entries)
}

fn collect(base: &Path, dir: &Path, entries: &mut Vec<Entry>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(base, &path, entries)?;
            continue;
        }
        let name = path.strip_prefix(base)?.to_str().context("a name in UTF-8")?.to_owned();
        entries.push(Entry { path: name, sum: sum(&path)? });
    }
    Ok(())
}

/// Returns the checksum of a file.
pub fn sum(file: &Path) -> Result<Sum> {
    let bytes = fs::read(file).with_context(|| format!("read {}", file.display()))?;
    Ok(Sha256::digest(bytes).into())
}

/// Creates an ext4 image of the directory.
pub fn ext4(image: PathBuf, folder: &Path) -> Result<PathBuf> {
    let mut mke2fs = tools::program("mke2fs")?;
    mke2fs.args(["-q", "-F", "-t", "ext4", "-d"]).arg(folder).arg(&image).arg("96M");
    exec::succeed(&mut mke2fs, QUICK)?;
    Ok(image)
}

/// Creates a FAT32 image of the directory.
pub fn fat(image: PathBuf, folder: &Path) -> Result<PathBuf> {
    blank(&image, 96 << 20)?;
    exec::succeed(tools::program("mkfs.vfat")?.args(["-F", "32"]).arg(&image), QUICK)?;
    let mut mcopy = tools::program("mcopy")?;
    mcopy.env("LC_ALL", "C.UTF-8").args(["-s", "-i"]).arg(&image);
    for entry in fs::read_dir(folder)? {
        mcopy.arg(entry?.path());
    }
    exec::succeed(mcopy.arg("::"), QUICK)?;
    Ok(image)
}

/// Creates a sparse file of zeros.
pub fn blank(file: &Path, bytes: u64) -> Result<()> {
    Ok(File::create(file)?.set_len(bytes)?)
}
