//! Downloaded files: unpacked Debian packages, Xen and the guests' kernel ready to boot.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use super::debs::Selection;
use super::{kernel, libs};

/// To be incremented when the processing of the packages changes.
const FORMAT: u32 = 1;

/// A complete directory of downloaded files; incomplete ones have another name.
pub struct Cache {
    dir: PathBuf,
    /// The kernel's version, as `uname -r` prints it.
    pub kernel: String,
}

impl Cache {
    /// Returns the directory of the current packages; downloads them if necessary.
    ///
    /// # Errors
    /// apt does not know the packages or cannot download them, or the disk is full.
    pub fn fill() -> Result<Self> {
        let base = base()?;
        fs::create_dir_all(&base).with_context(|| format!("make {}", base.display()))?;
        let selection = Selection::look_up()?;
        let dir = base.join(key(&selection.manifest));
        let cache = Self { dir, kernel: selection.kernel.clone() };
        if cache.dir.is_dir() {
            return Ok(cache);
        }
        println!("    fetching Xen, Linux {} and tools to {}", cache.kernel, cache.dir.display());
        // Downloaded to a temporary directory, and renamed when complete: two processes may
        // download at the same time, and one may be killed.
        let work = tempfile::Builder::new().prefix("fetching-").tempdir_in(&base)?;
        let made = Self { dir: work.path().to_path_buf(), kernel: cache.kernel.clone() };
        let debs = work.path().join("debs");
        fs::create_dir(&debs)?;
        fs::create_dir(made.root())?;
        selection.unpack(&debs, &made.root())?;
        fs::remove_dir_all(&debs)?;
        made.unpack_xen()?;
        made.unpack_kernel()?;
        fs::write(made.dir.join("packages"), &selection.manifest)?;
        let from = work.keep();
        if let Err(error) = fs::rename(&from, &cache.dir) {
            fs::remove_dir_all(&from)?;
            ensure!(cache.dir.is_dir(), "{}: {error}", cache.dir.display());
        }
        Ok(cache)
    }

    /// Returns the root of the unpacked packages.
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// Returns the path of Xen, in the format for QEMU's multiboot loader.
    pub fn xen(&self) -> PathBuf {
        self.dir.join("xen")
    }

    /// Returns the path of the kernel of dom0 and the guests, an ELF image.
    pub fn vmlinux(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    /// Returns the path of the same kernel as a bzImage, for HVM guests.
    pub fn vmlinuz(&self) -> PathBuf {
        self.root().join(format!("boot/vmlinuz-{}", self.kernel))
    }

    fn unpack_xen(&self) -> Result<()> {
        let packed = self.root().join("boot/xen-4.17-amd64.gz");
        self.unpack_with("bin/gzip", &packed, &self.xen())
    }

    /// Done once here: the domain builder would take 12 s for it in each domain.
    fn unpack_kernel(&self) -> Result<()> {
        let image = fs::read(self.vmlinuz())?;
        let payload = kernel::payload(&image)?;
        if !payload.starts_with(b"\xfd7zXZ\0") {
            bail!("this kernel is compressed by something else than xz");
        }
        let packed = self.dir.join("vmlinux.xz");
        // The xz stream is followed by four bytes with the uncompressed size, which are not part of
        // it.
        fs::write(&packed, &payload[..payload.len() - 4])?;
        self.unpack_with("usr/bin/xz", &packed, &self.vmlinux())?;
        fs::remove_file(packed)?;
        ensure!(fs::read(self.vmlinux())?.starts_with(b"\x7fELF"), "the kernel is no ELF file");
        Ok(())
    }

    /// Runs one of the downloaded decompressors, from a file to a file.
    pub(super) fn unpack_with(&self, program: &str, from: &Path, to: &Path) -> Result<()> {
        let mut unpack = libs::program(&self.root(), program);
        unpack.arg("-dc").stdin(File::open(from)?).stdout(File::create(to)?);
        let ran = unpack.stderr(Stdio::piped()).output().context(program.to_owned())?;
        ensure!(ran.status.success(), "{program}: {}", String::from_utf8_lossy(&ran.stderr));
        Ok(())
    }
}

fn key(manifest: &str) -> String {
    let sum = Sha256::digest(format!("{FORMAT}\n{manifest}"));
    sum.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// Returns the base directory of downloads: `$PVIO_LAB_CACHE`, else `$XDG_CACHE_HOME/pvio-lab`,
/// else `~/.cache/pvio-lab`.
///
/// # Errors
/// None of the variables is set.
pub fn base() -> Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|it| !it.is_empty()).map(PathBuf::from);
    let cache = || set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
    let base = set("PVIO_LAB_CACHE").or_else(|| cache().map(|it| it.join("pvio-lab")));
    let base = base.context("neither PVIO_LAB_CACHE, XDG_CACHE_HOME nor HOME is set")?;
    Ok(std::path::absolute(base)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_key_differs_by_manifest() {
        assert_ne!(key("a_1.deb"), key("a_2.deb"));
        assert_eq!(key("a_1.deb"), key("a_1.deb"));
    }
}
