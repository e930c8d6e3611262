//! ext2, ext3 and ext4, read-only. No available library supports everything that Linux reads. One
//! returns the old contents of unwritten extents, and rejects inodes of 128 bytes with checksums
//! and timestamps outside of 1970 to 2038. The others support even less.
//!
//! This reader supports what Linux mounts read-only. It rejects volumes whose journal must be
//! replayed, and encrypted files. Checksums of the superblock, inodes, extents and directory
//! entries are verified where the volume has them.
//!
//! | module | contents |
//! |---|---|
//! | `layout` | on-disk structures |
//! | `volume` | superblock, groups, inodes, checksums |
//! | `map` | mapping from blocks of a file to blocks of the disk |
//! | `dir` | entries of directories |

#![allow(clippy::missing_errors_doc, reason = "all fail with FsError, which says why")]
mod dir;
#[allow(missing_docs, reason = "named and laid out as in Linux")]
mod layout;
mod map;
mod volume;

use super::cache::Cache;
use super::{
    Entry, FsError, FsInfo, Handle, Kind, MAX_ENTRIES, MAX_LINKS, MAX_OPEN, MAX_PATH, Meta,
    Mounted, Target, sort_entries,
};
use layout::flags;
use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::ops::ControlFlow;
use std::rc::Rc;
use volume::{Node, Volume};

/// File types in `i_mode`.
const REGULAR: u16 = 0x8000;
const DIRECTORY: u16 = 0x4000;
const SYMLINK: u16 = 0xa000;
/// Inode number of the root directory.
const ROOT: u32 = 2;
/// Symlinks up to this length are stored in the inode's block pointers.
const FAST_SYMLINK: u64 = 60;

pub(super) struct ExtFs {
    volume: Volume,
    files: HashMap<Handle, Open>,
}

/// An open file.
struct Open {
    node: Node,
    len: u64,
    /// Its data, if stored in the inode.
    inline: Option<Vec<u8>>,
}

impl ExtFs {
    pub(super) fn mount(cache: &Rc<RefCell<Cache>>) -> Result<Self, FsError> {
        let volume = Volume::mount(cache)?;
        if !volume.node(ROOT)?.is(DIRECTORY) {
            return Err(FsError::Corrupt("the root is no directory".into()));
        }
        Ok(Self { volume, files: HashMap::new() })
    }

    /// Returns the inode of a path; follows symlinks.
    fn resolve(&self, path: &[u8]) -> Result<Node, FsError> {
        let mut todo: VecDeque<Vec<u8>> = split(path);
        let mut above = vec![self.volume.node(ROOT)?];
        let mut links = 0;
        while let Some(name) = todo.pop_front() {
            if name == b".." {
                if above.len() > 1 {
                    above.pop();
                }
                continue;
            }
            let here = above.last().ok_or(FsError::NotFound)?;
            let node = self.find(here, &name)?;
            if !node.is(SYMLINK) {
                above.push(node);
                continue;
            }
            links += 1;
            let target = self.link(&node)?;
            if links > MAX_LINKS {
                return Err(FsError::TooFar);
            }
            if target.starts_with(b"/") {
                above.truncate(1);
            }
            for name in split(&target).into_iter().rev() {
                todo.push_front(name);
            }
            if todo.iter().map(|n| n.len() + 1).sum::<usize>() > MAX_PATH {
                return Err(FsError::TooFar);
            }
        }
        above.pop().ok_or(FsError::NotFound)
    }

    /// Returns the inode of a name in a directory.
    fn find(&self, dir: &Node, wanted: &[u8]) -> Result<Node, FsError> {
        if !dir.is(DIRECTORY) {
            return Err(FsError::NotFound);
        }
        not_encrypted(dir)?;
        let found = dir::entries(&self.volume, dir, |inode, name| {
            if name == wanted { ControlFlow::Break(inode) } else { ControlFlow::Continue(()) }
        })?;
        match found {
            ControlFlow::Break(inode) => self.volume.node(inode),
            ControlFlow::Continue(()) => Err(FsError::NotFound),
        }
    }

    /// Returns the target of a symlink.
    fn link(&self, node: &Node) -> Result<Vec<u8>, FsError> {
        not_encrypted(node)?;
        let len = u64::from(node.inode.size_lo.get());
        if len > MAX_PATH as u64 {
            return Err(FsError::TooFar);
        }
        let bytes = usize::try_from(len).unwrap_or_default();
        let fast = len < FAST_SYMLINK && !node.has(flags::INLINE_DATA | flags::EXTENTS);
        let mut target = match node.inode.block.get(..bytes) {
            Some(target) if fast => target.to_vec(),
            _ => {
                let mut target = vec![0; bytes];
                self.fill(&self.open(node.clone(), len)?, 0, &mut target)?;
                target
            }
        };
        // Linux ends the target at the first NUL.
        target.truncate(target.iter().position(|b| *b == 0).unwrap_or(target.len()));
        Ok(target)
    }

    fn list(&self, dir: &Node) -> Result<Target, FsError> {
        not_encrypted(dir)?;
        let mut names = Vec::new();
        let mut left_out = 0;
        let walked = dir::entries(&self.volume, dir, |inode, name| {
            if names.len() == MAX_ENTRIES {
                left_out += 1;
            } else {
                names.push((inode, name.to_vec()));
            }
            ControlFlow::<()>::Continue(())
        })?;
        debug_assert!(walked.is_continue());
        let mut entries: Vec<_> = names
            .into_iter()
            .map(|(inode, name)| match self.volume.node(inode) {
                Ok(node) => Entry { name, kind: kind(&node), meta: self.stat(&node) },
                // One damaged inode must not hide the other entries of its directory.
                Err(_) => {
                    Entry { name, kind: Kind::Special, meta: Meta { len: 0, modified: None } }
                }
            })
            .collect();
        sort_entries(&mut entries);
        Ok(Target::Dir { entries, left_out })
    }

    fn stat(&self, node: &Node) -> Meta {
        let len = node.len(self.volume.has_large_directories());
        Meta { len, modified: Some(node.modified()) }
    }

    fn open(&self, node: Node, len: u64) -> Result<Open, FsError> {
        let inline = node.has(flags::INLINE_DATA).then(|| node.inline_data()).transpose()?;
        Ok(Open { node, len, inline })
    }

    fn open_file(&mut self, node: Node, handle: Handle) -> Result<Target, FsError> {
        if !node.is(REGULAR) {
            return Err(FsError::Special);
        }
        not_encrypted(&node)?;
        if self.files.len() >= MAX_OPEN {
            return Err(FsError::TooManyOpen);
        }
        let meta = self.stat(&node);
        let file = self.open(node, meta.len)?;
        self.files.insert(handle, file);
        Ok(Target::File { handle, meta, is_index: false })
    }

    /// Fills `buf` from an offset of a file; the range must be within the file.
    fn fill(&self, file: &Open, offset: u64, buf: &mut [u8]) -> Result<(), FsError> {
        if let Some(data) = &file.inline {
            let from = usize::try_from(offset).unwrap_or(usize::MAX);
            let part = data.get(from..).and_then(|data| data.get(..buf.len()));
            let cut = || FsError::Corrupt("a file that is longer than its inode".into());
            buf.copy_from_slice(part.ok_or_else(cut)?);
            return Ok(());
        }
        let unit = self.volume.block_size;
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = offset.saturating_add(done as u64);
            let (block, within) = (at / unit, at % unit);
            let run = map::run(&self.volume, &file.node, block)?;
            let most = run.blocks.saturating_mul(unit).saturating_sub(within);
            let len = rest.len().min(usize::try_from(most).unwrap_or(usize::MAX));
            let part = rest.get_mut(..len).filter(|part| !part.is_empty());
            let part = part.ok_or_else(|| FsError::Corrupt("a run of no blocks".into()))?;
            match run.start {
                Some(start) => self.volume.read(start, within, part)?,
                None => part.fill(0),
            }
            done += len;
        }
        Ok(())
    }
}

impl Mounted for ExtFs {
    fn info(&self) -> FsInfo {
        let superblock = &self.volume.superblock;
        let name = superblock.volume_name.split(|b| *b == 0).next().unwrap_or_default();
        let label = String::from_utf8_lossy(name).into_owned();
        let hex = |part: &[u8]| part.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let uuid = &superblock.uuid;
        let parts = [&uuid[..4], &uuid[4..6], &uuid[6..8], &uuid[8..10], &uuid[10..]];
        let id = parts.map(hex).join("-");
        // ext4 volumes have extents; without them it is ext2 or ext3.
        let kind = if self.volume.has_extents() { "ext4" } else { "ext2" };
        FsInfo { kind, label, size: self.volume.size(), id }
    }

    fn visit(&mut self, path: &[u8], index: bool, handle: Handle) -> Result<Target, FsError> {
        let node = self.resolve(path)?;
        if !node.is(DIRECTORY) {
            return self.open_file(node, handle);
        }
        if index
            && let Ok(inside) = self.resolve(&[path, b"/index.html"].concat())
            && let Ok(Target::File { meta, .. }) = self.open_file(inside, handle)
        {
            return Ok(Target::File { handle, meta, is_index: true });
        }
        self.list(&node)
    }

    fn read(&mut self, handle: Handle, offset: u64, buf: &mut [u8]) -> Result<usize, FsError> {
        let file = self.files.get(&handle).ok_or(FsError::Stale)?;
        let left = usize::try_from(file.len.saturating_sub(offset)).unwrap_or(usize::MAX);
        let len = left.min(buf.len());
        self.fill(file, offset, buf.get_mut(..len).unwrap_or_default())?;
        Ok(len)
    }

    fn close(&mut self, handle: Handle) {
        self.files.remove(&handle);
    }
}

fn not_encrypted(node: &Node) -> Result<(), FsError> {
    if node.has(flags::ENCRYPT) {
        return Err(FsError::Unsupported("the file is encrypted".into()));
    }
    Ok(())
}

fn kind(node: &Node) -> Kind {
    match node.inode.mode.get() & 0xf000 {
        REGULAR => Kind::File,
        DIRECTORY => Kind::Dir,
        SYMLINK => Kind::Link,
        _ => Kind::Special,
    }
}

fn split(path: &[u8]) -> VecDeque<Vec<u8>> {
    let real = |name: &&[u8]| !name.is_empty() && *name != b".";
    path.split(|b| *b == b'/').filter(real).map(<[u8]>::to_vec).collect()
}
