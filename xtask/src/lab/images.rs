//! Initramfs images of dom0 and the guests: the agent as `/init`, Debian's programs with their
//! libraries, kernel modules.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::cache::Cache;
use super::cpio::Archive;
use super::kernel::Modules;
use super::libs;
use crate::exec;

/// Debian's programs in dom0, with their paths in the packages.
const DOM0_PROGRAMS: &[&str] = &[
    "usr/lib/xen-4.17/bin/xl",
    "usr/lib/xen-4.17/bin/xenstored",
    "usr/lib/xen-4.17/bin/xenconsoled",
    "usr/lib/xen-4.17/bin/xenconsole",
    "usr/lib/xen-4.17/bin/xen-init-dom0",
    "usr/lib/xen-4.17/bin/libxl-save-helper",
    "usr/lib/xen-4.17/bin/lsevtchn",
    "usr/bin/xenstore",
    "usr/libexec/xen-qemu-system-i386",
    "usr/bin/qemu-img",
    "usr/bin/qemu-nbd",
    "sbin/losetup",
];

/// Debian's programs in dom0 and in guests.
const PROGRAMS: &[&str] =
    &["bin/ip", "bin/ping", "sbin/mke2fs", "sbin/e2fsck", "sbin/ethtool", "usr/bin/iperf3"];

/// Debian's programs in every guest.
const GUEST_PROGRAMS: &[&str] = &["bin/ip", "sbin/ethtool"];

/// Debian's programs for disks in guests that have tools.
const GUEST_TOOLS: &[&str] = &["sbin/fstrim", "sbin/blkdiscard"];

/// In a separate part of the image: its libraries are larger than everything else.
const FIO: &str = "usr/bin/fio";

/// Files that dom0's programs read.
const DOM0_FILES: &[&str] = &[
    "etc/mke2fs.conf",
    // For HVM guests
    "usr/lib/xen-4.17/boot/hvmloader",
    "usr/share/seabios/bios-256k.bin",
    "usr/share/qemu/kvmvapic.bin",
    "usr/share/qemu/linuxboot.bin",
    "usr/share/qemu/linuxboot_dma.bin",
];

/// Names of the links to `usr/bin/xenstore`.
const XENSTORE: &[&str] = &["ls", "read", "write", "list", "rm", "exists", "watch", "chmod"];

const DOM0_MODULES: &[&str] = &[
    "xen-evtchn",
    "xen-gntdev",
    "xen-gntalloc",
    "xen-privcmd",
    "xenfs",
    "xen-blkback",
    "xen-netback",
    "xen-blkfront",
    "loop",
    "null_blk",
    "tun",
    "bridge",
    "8021q",
    "veth",
    "ext4",
    "virtio_pci",
    "9p",
    "9pnet_virtio",
];

/// A guest that is a driver domain needs the modules of backends as well.
const GUEST_MODULES: &[&str] = &[
    "xen-blkfront",
    "xen-netfront",
    "8021q",
    "ext4",
    "xen-evtchn",
    "xen-gntdev",
    "xen-gntalloc",
    "xen-privcmd",
    "xenfs",
    "xen-blkback",
    "xen-netback",
    "loop",
    "tun",
    "bridge",
];

/// Programs that are not from the packages.
pub struct Programs {
    /// The lab's `/init`, a static executable.
    pub agent: PathBuf,
    /// The backend under test.
    pub pvio: Option<PathBuf>,
}

/// Writes dom0's image, which contains the parts of the guests' images. In dom0, a guest's image is
/// assembled from the parts that its scenario needs. Unneeded parts would cost time, as every byte
/// is read, copied into the guest and unpacked there.
pub fn write(cache: &Cache, programs: &Programs, to: &Path) -> Result<()> {
    let lean = programs.without_debug_information(to)?;
    let programs = &lean;
    let (guest, base) = guest(cache, programs)?;
    let (tools, with_tools) = part(cache, base.clone(), |image| {
        image.programs(PROGRAMS)?;
        image.programs(GUEST_TOOLS)?;
        image.archive.copy("etc/mke2fs.conf", &cache.root().join("etc/mke2fs.conf"))
    })?;
    let (fio, _) = part(cache, with_tools, |image| image.programs(&[FIO]))?;
    let (pvio, _) = part(cache, base, |image| image.pvio(programs))?;
    let out = BufWriter::new(File::create(to)?);
    let mut image = Image::new(cache, out)?;
    image.archive.copy("init", &programs.agent)?;
    image.programs(DOM0_PROGRAMS)?;
    image.programs(PROGRAMS)?;
    for file in DOM0_FILES {
        image.archive.copy(&merged(file), &cache.root().join(file))?;
    }
    image.tree("usr/share/qemu/keymaps")?;
    for name in XENSTORE {
        image.archive.link(&format!("usr/bin/xenstore-{name}"), "xenstore")?;
    }
    for name in ["block", "vif-bridge"] {
        image.archive.link(&format!("etc/xen/scripts/{name}"), "/init")?;
    }
    for name in ["block-pvio", "vif-pvio"] {
        image.archive.link(&format!("etc/xen/scripts/{name}"), "/usr/bin/pvio")?;
    }
    image.archive.file("etc/xen/xl.conf", b"")?;
    image.archive.copy("usr/bin/busybox", &cache.root().join("bin/busybox"))?;
    image.archive.link("usr/bin/sh", "busybox")?;
    image.pvio(programs)?;
    image.modules(DOM0_MODULES)?;
    image.archive.copy("lab/vmlinux", &cache.vmlinux())?;
    image.archive.copy("lab/vmlinuz", &cache.vmlinuz())?;
    for name in ["grub-x86_64-xen.bin", "grub-i386-xen_pvh.bin"] {
        let file = cache.root().join("usr/lib/grub-xen").join(name);
        image.archive.copy(&format!("lab/{name}"), &file)?;
    }
    image.archive.copy("lab/ipxe.lkrn", &cache.root().join("boot/ipxe.lkrn"))?;
    for (name, bytes) in [("guest", &guest), ("tools", &tools), ("fio", &fio), ("pvio", &pvio)] {
        image.archive.file(&format!("lab/{name}.cpio"), bytes)?;
    }
    // Compressed for HVM guests, whose firmware reads it byte by byte.
    let file = to.with_file_name("guest.cpio");
    fs::write(&file, &guest)?;
    exec::succeed(Command::new("gzip").args(["-9", "-f"]).arg(&file), Duration::from_secs(60))?;
    image.archive.copy("lab/guest.cpio.gz", &to.with_file_name("guest.cpio.gz"))?;
    image.archive.finish()?.into_inner().context("write dom0's image")?;
    Ok(())
}

/// Paths of the files in an image.
type Copied = BTreeSet<String>;

/// Returns the image of a guest with only the agent, and its files.
fn guest(cache: &Cache, programs: &Programs) -> Result<(Vec<u8>, Copied)> {
    let mut image = Image::new(cache, Vec::new())?;
    image.archive.copy("init", &programs.agent)?;
    image.programs(GUEST_PROGRAMS)?;
    image.modules(GUEST_MODULES)?;
    Ok((image.archive.finish()?, image.copied))
}

/// Returns an archive of files to add to an image that contains `copied`, and the files of both.
fn part(
    cache: &Cache,
    copied: Copied,
    fill: impl FnOnce(&mut Image<'_, Vec<u8>>) -> Result<()>,
) -> Result<(Vec<u8>, Copied)> {
    let mut image = Image { cache, archive: Archive::new(Vec::new()), copied };
    fill(&mut image)?;
    Ok((image.archive.finish()?, image.copied))
}

impl Programs {
    /// Returns stripped copies, stored beside `to`. They keep the names of functions; the removed
    /// debug information is four fifths of the command's size.
    fn without_debug_information(&self, to: &Path) -> Result<Self> {
        let strip = |program: &Path, name: &str| {
            let lean = to.with_file_name(name);
            let mut strip = Command::new("strip");
            strip.args(["--strip-debug", "-o"]).arg(&lean).arg(program);
            exec::succeed(&mut strip, Duration::from_secs(60))
                .context("strip comes with the compiler's linker: apt install binutils")?;
            anyhow::Ok(lean)
        };
        let agent = strip(&self.agent, "agent.lean")?;
        let pvio = self.pvio.as_ref().map(|pvio| strip(pvio, "pvio.lean")).transpose()?;
        Ok(Self { agent, pvio })
    }
}

struct Image<'a, W: Write> {
    cache: &'a Cache,
    archive: Archive<W>,
    copied: Copied,
}

impl<'a, W: Write> Image<'a, W> {
    /// Starts an image with mount points, and links for the directories that Debian merged into
    /// `usr`.
    fn new(cache: &'a Cache, out: W) -> Result<Self> {
        let mut archive = Archive::new(out);
        for name in ["bin", "sbin", "lib", "lib64"] {
            archive.folder(&format!("usr/{name}"))?;
            archive.link(name, &format!("usr/{name}"))?;
        }
        for name in ["proc", "sys", "dev", "run", "tmp", "mnt", "share", "var/log/xen"] {
            archive.folder(name)?;
        }
        for name in ["var/lib/xen", "var/lib/xenstored"] {
            archive.folder(name)?;
        }
        archive.link("var/run", "/run")?;
        Ok(Self { cache, archive, copied: Copied::new() })
    }

    fn programs(&mut self, programs: &[&str]) -> Result<()> {
        let root = self.cache.root();
        for program in programs {
            self.once(&merged(program), &root.join(program))?;
            self.libraries(&root.join(program))?;
        }
        Ok(())
    }

    fn pvio(&mut self, programs: &Programs) -> Result<()> {
        let Some(pvio) = &programs.pvio else { return Ok(()) };
        self.archive.copy("usr/bin/pvio", pvio)?;
        self.archive.link("usr/bin/pvio-dm", "pvio")?;
        self.libraries(pvio)
    }

    fn libraries(&mut self, program: &Path) -> Result<()> {
        let root = self.cache.root();
        for library in libs::needed(&root, program)? {
            let path = library.strip_prefix(&root)?.to_str().context("a path in UTF-8")?;
            self.once(&merged(path), &library)?;
        }
        // `pthread_cancel` loads this library by name.
        if !self.copied.contains("usr/lib/x86_64-linux-gnu/libgcc_s.so.1") {
            let path = "lib/x86_64-linux-gnu/libgcc_s.so.1";
            self.once(&merged(path), &root.join(path))?;
        }
        self.loader()
    }

    /// Adds the dynamic loader at the path that programs contain.
    fn loader(&mut self) -> Result<()> {
        let path = "usr/lib64/ld-linux-x86-64.so.2".to_owned();
        if self.copied.insert(path.clone()) {
            self.archive.link(&path, "/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")?;
        }
        Ok(())
    }

    /// Adds all files below a directory of the packages.
    fn tree(&mut self, folder: &str) -> Result<()> {
        for entry in fs::read_dir(self.cache.root().join(folder)).context(folder.to_owned())? {
            let entry = entry?;
            let path = format!("{folder}/{}", entry.file_name().to_string_lossy());
            if entry.path().is_dir() {
                self.tree(&path)?;
            } else {
                self.archive.copy(&path, &entry.path())?;
            }
        }
        Ok(())
    }

    /// Adds modules, and the list that the agent uses to load them: lines of `NAME PATH NEEDS…`.
    fn modules(&mut self, names: &[&str]) -> Result<()> {
        let root = self.cache.root();
        let modules = Modules::find(&root, &self.cache.kernel)?;
        let mut list = String::new();
        for (name, path, needs) in modules.closure(names)? {
            self.archive.copy(&merged(&path), &root.join(&path))?;
            list += &format!("{name} /{} {}\n", merged(&path), needs.join(" "));
        }
        Ok(self.archive.file("lab/modules", list.as_bytes())?)
    }

    fn once(&mut self, path: &str, from: &Path) -> Result<()> {
        if self.copied.insert(path.to_owned()) {
            self.archive.copy(path, from)?;
        }
        Ok(())
    }
}

/// Returns a file's path after `/bin` and the like are replaced by links into `/usr`.
fn merged(path: &str) -> String {
    let first = path.split('/').next().unwrap_or_default();
    if matches!(first, "bin" | "sbin" | "lib" | "lib64") {
        return format!("usr/{path}");
    }
    path.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn top_level_directories_are_merged_into_usr() {
        assert_eq!(merged("lib/x/libc.so.6"), "usr/lib/x/libc.so.6");
        assert_eq!(merged("usr/bin/fio"), "usr/bin/fio");
        assert_eq!(merged("etc/mke2fs.conf"), "etc/mke2fs.conf");
    }
}
