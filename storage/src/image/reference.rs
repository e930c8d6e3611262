//! Files that the header of an image names: backing files, data files, extents.
//!
//! A header is untrusted input. The files that it names are opened only below *image roots*: the
//! directory of the image that the operator named, and the directories that the operator adds. The
//! kernel resolves each name (`openat2` with `RESOLVE_BENEATH`), so that no `..`, symbolic link or
//! concurrent rename leads out. The only exception is a block device that a symbolic link below a
//! root refers to, because logical volumes are named by such links.

use super::error::{ImageError, ReferenceProblem};
use super::file::FileHandle;
use alloc::vec::Vec;
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, openat2, readlinkat};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// Attempts to resolve a name while directories in its path are being renamed (`EAGAIN`).
const MAX_ATTEMPTS: u32 = 16;

/// The policy for files that the headers of a disk's images name.
#[derive(Clone, Debug, Default)]
pub(super) struct ReferencePolicy {
    /// Image roots in addition to the image's own directory.
    pub roots: Vec<PathBuf>,
    /// Whether a file with any name below a root may be written.
    pub write_any: bool,
}

/// The image roots of one disk.
#[derive(Debug)]
pub(super) struct ImageRoots {
    /// Absolute paths of directories.
    roots: Vec<PathBuf>,
    write_any: bool,
}

impl ImageRoots {
    /// Returns the image roots of the disk in this image.
    pub fn of(image: &FileHandle, policy: &ReferencePolicy) -> Result<Self, ImageError> {
        let mut roots = Vec::new();
        roots.extend(own_root(image)?);
        for root in &policy.roots {
            roots.push(absolute(root)?);
        }
        Ok(Self { roots, write_any: policy.write_any })
    }

    /// Returns the paths of the directories.
    pub fn into_paths(self) -> Vec<PathBuf> {
        self.roots
    }

    /// Locates a file that the header of `image` names, for reading. A relative name is relative to
    /// the directory of that image.
    pub fn find(&self, image: &FileHandle, name: &Path) -> Result<FileHandle, ImageError> {
        self.locate(image, name).map(|(file, _)| file)
    }

    /// Locates a file that the header of `image` names, for writing. Its name must derive from the
    /// image's name, unless the operator allows any.
    pub fn find_written(&self, image: &FileHandle, name: &Path) -> Result<FileHandle, ImageError> {
        let refuse = |problem| Err(refused(image.path(), name, problem));
        if !self.write_any && !is_derived(image.path(), name) {
            return refuse(ReferenceProblem::NotDerived);
        }
        let (file, is_link) = self.locate(image, name)?;
        if is_link && !self.write_any && !file.is_block_device() {
            return refuse(ReferenceProblem::WrittenLink);
        }
        Ok(file)
    }

    /// Also returns whether a symbolic link was followed to the file itself.
    fn locate(&self, image: &FileHandle, name: &Path) -> Result<(FileHandle, bool), ImageError> {
        let refuse = |problem| refused(image.path(), name, problem);
        let directory = directory(image.path())?;
        let path = referenced_path(image.path(), name)?;
        // `..` in a name is resolved by the kernel, and then textually, for both the given and the
        // canonical path of the directory.
        let real = std::fs::canonicalize(&directory).unwrap_or_else(|_| directory.clone());
        let candidates = [path.clone(), normalized(&path), normalized(&real.join(name))];
        let mut problem = self.outside();
        let mut found = None;
        for candidate in candidates {
            match self.below_roots(&candidate) {
                Ok(file) => {
                    found = Some(file);
                    break;
                }
                // An error below a root is more specific than that the path is below none.
                Err(ReferenceProblem::Outside(_)) => {}
                Err(other) => problem = other,
            }
        }
        if let (None, ReferenceProblem::LinkOutside) = (&found, &problem)
            && let Ok(target) = std::fs::canonicalize(&path)
        {
            // The link may lead to another root, or into its own root by an absolute path. The
            // canonical path is only a hint: the file is resolved below a root once more.
            found = self.below_roots(&target).ok().map(|(file, _)| (file, true));
        }
        let (fd, is_link) = found.ok_or_else(|| refuse(problem))?;
        let file = FileHandle::new(fd, path, Some(image.path().into()));
        Ok((file.map_err(|_| refuse(ReferenceProblem::NotADisk))?, is_link))
    }

    fn outside(&self) -> ReferenceProblem {
        ReferenceProblem::Outside(self.roots.clone())
    }

    /// Resolves an absolute path within the root that contains it.
    fn below_roots(&self, path: &Path) -> Result<(OwnedFd, bool), ReferenceProblem> {
        let mut problem = self.outside();
        for root in &self.roots {
            // A root has two paths if it is reached through a symbolic link.
            let real = std::fs::canonicalize(root).ok();
            let names = [Some(root.as_path()), real.as_deref()];
            let Some(below) = names.into_iter().flatten().find_map(|n| path.strip_prefix(n).ok())
            else {
                continue;
            };
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let directory = rustix::fs::open(root, flags, Mode::empty())
                .map_err(|errno| ReferenceProblem::Root(root.clone(), errno.into()))?;
            match self.below(&directory, below) {
                Err(ReferenceProblem::Outside(_)) => {}
                // The path may be below another root as well.
                Err(error) => problem = error,
                found => return found,
            }
        }
        Err(problem)
    }

    /// Resolves a relative path below a directory.
    fn below(&self, root: &OwnedFd, path: &Path) -> Result<(OwnedFd, bool), ReferenceProblem> {
        let climbs = path.components().any(|component| component == Component::ParentDir);
        let found = beneath(root, path, OFlags::NOFOLLOW).map_err(|errno| match errno {
            Errno::XDEV if climbs => self.outside(),
            errno => explained(errno),
        })?;
        if kind(&found)? != FileType::Symlink {
            return Ok((found, false));
        }
        match beneath(root, path, OFlags::empty()) {
            Ok(file) => return Ok((file, true)),
            Err(Errno::XDEV) => {}
            Err(errno) => return Err(explained(errno)),
        }
        let target = readlinkat(&found, "", Vec::new()).map_err(explained)?;
        let target = Path::new(OsStr::from_bytes(target.as_bytes()));
        let above = beneath(root, path.parent().unwrap_or(path), OFlags::DIRECTORY);
        let above = above.map_err(explained)?;
        let file = resolved(&above, target, OFlags::empty(), ResolveFlags::NO_MAGICLINKS);
        let file = file.map_err(explained)?;
        match kind(&file)? {
            FileType::BlockDevice => Ok((file, true)),
            _ => Err(ReferenceProblem::LinkOutside),
        }
    }
}

fn explained(errno: Errno) -> ReferenceProblem {
    match errno {
        Errno::NOENT | Errno::NOTDIR => ReferenceProblem::Missing,
        Errno::XDEV | Errno::LOOP => ReferenceProblem::LinkOutside,
        // System call filters return either of these for unknown system calls.
        Errno::NOSYS | Errno::PERM => ReferenceProblem::NoOpenat2,
        errno => ReferenceProblem::System(errno.into()),
    }
}

/// Returns whether a name derives from the image's name, as programs that create images of several
/// files name them: `a-flat.vmdk`, `a-s001.vmdk` or `a-f001.vmdk` beside `a.vmdk`.
fn is_derived(image: &Path, name: &Path) -> bool {
    let beside = match name.parent() {
        Some(parent) if parent.as_os_str().is_empty() => true,
        Some(parent) => image.parent() == Some(parent),
        None => false,
    };
    let (Some(stem), Some(file)) = (image.file_stem(), name.file_name()) else { return false };
    let Some(rest) = file.as_bytes().strip_prefix(stem.as_bytes()) else { return false };
    let own = image.extension().map(OsStr::as_bytes);
    let (part, suffix) = match rest.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&rest[..dot], rest.get(dot + 1..)),
        None => (rest, None),
    };
    let numbered = |digits: &[u8]| digits.len() >= 3 && digits.iter().all(u8::is_ascii_digit);
    let is_part = match part {
        b"-flat" => true,
        [b'-', b's' | b'f', digits @ ..] => numbered(digits),
        _ => false,
    };
    beside && is_part && (suffix == own || suffix == Some(b"vmdk"))
}

/// Returns the directory of an image, unless it also holds files that do not belong to the image.
fn own_root(image: &FileHandle) -> Result<Option<PathBuf>, ImageError> {
    let directory = directory(image.path())?;
    let real = std::fs::canonicalize(&directory).unwrap_or_else(|_| directory.clone());
    // An image on a block device: its directory contains the disks of other guests. The root
    // directory contains all files of the host.
    let shared = image.is_block_device() && real.starts_with("/dev") || real == Path::new("/");
    Ok((!shared).then_some(directory))
}

/// Returns the path, for messages, of a file that the header of an image names.
pub(super) fn referenced_path(image: &Path, name: &Path) -> Result<PathBuf, ImageError> {
    Ok(directory(image)?.join(name))
}

fn directory(image: &Path) -> Result<PathBuf, ImageError> {
    Ok(absolute(image)?.parent().map(Path::to_path_buf).unwrap_or_default())
}

fn refused(image: &Path, name: &Path, problem: ReferenceProblem) -> ImageError {
    ImageError::Reference { image: image.into(), name: name.into(), problem }
}

fn absolute(path: &Path) -> Result<PathBuf, ImageError> {
    std::path::absolute(path).map_err(|error| ImageError::Other { path: path.into(), error })
}

fn kind(fd: &OwnedFd) -> Result<FileType, ReferenceProblem> {
    let stat = fstat(fd).map_err(|errno| ReferenceProblem::System(errno.into()))?;
    Ok(FileType::from_raw_mode(stat.st_mode))
}

fn beneath(root: &OwnedFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    resolved(root, path, flags, ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS)
}

fn resolved(
    directory: impl AsFd,
    path: &Path,
    flags: OFlags,
    resolve: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::PATH | OFlags::CLOEXEC;
    let open = || openat2(&directory, path, flags, Mode::empty(), resolve);
    let mut opened = open();
    for _ in 1..MAX_ATTEMPTS {
        if !matches!(opened, Err(Errno::AGAIN | Errno::INTR)) {
            break;
        }
        opened = open();
    }
    opened
}

/// Removes `.` and `..` from a path textually.
fn normalized(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                plain.pop();
            }
            other => plain.push(other),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reference_on_kernel_without_openat2_is_rejected() {
        for errno in [Errno::NOSYS, Errno::PERM] {
            assert!(matches!(explained(errno), ReferenceProblem::NoOpenat2), "{errno}");
        }
    }

    #[test]
    fn extent_name_must_derive_from_descriptor_name() {
        for (image, name, derives) in [
            ("/s/a.vmdk", "a-flat.vmdk", true),
            ("/s/a.vmdk", "/s/a-flat.vmdk", true),
            ("/s/a.vmdk", "a-s001.vmdk", true),
            ("/s/a.vmdk", "a-f9999.vmdk", true),
            ("/s/a.img", "a-flat.img", true),
            ("/s/a.img", "a-flat.vmdk", true),
            ("/s/a", "a-flat", true),
            ("/s/a.b.vmdk", "a.b-flat.vmdk", true),
            ("/s/a.vmdk", "/t/a-flat.vmdk", false),
            ("/s/a.vmdk", "t/a-flat.vmdk", false),
            ("/s/a.vmdk", "../s/a-flat.vmdk", false),
            ("/s/a.vmdk", "b-flat.vmdk", false),
            ("/s/a.vmdk", "a-b-flat.vmdk", false),
            ("/s/a.vmdk", "a-flat.img", false),
            ("/s/a.vmdk", "a-flat", false),
            ("/s/a.vmdk", "a-flat.vmdk.vmdk", false),
            ("/s/a.vmdk", "a-s01.vmdk", false),
            ("/s/a.vmdk", "a-s00x.vmdk", false),
            ("/s/a.vmdk", "a.vmdk", false),
            ("/s/a.vmdk", "a", false),
            ("/s/a.vmdk", "..", false),
            ("/s/a.vmdk", "/", false),
        ] {
            assert_eq!(is_derived(Path::new(image), Path::new(name)), derives, "{image} {name}");
        }
    }
}
