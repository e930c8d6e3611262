//! ext2, ext3 and ext4, by `ext4-view`.
//!
//! Symlinks are followed here: the library reads a link's target whole, however long a hostile
//! inode says it is.

use super::cache::Cache;
use super::{
    Entry, FsError, FsInfo, Handle, Kind, MAX_ENTRIES, MAX_LINKS, MAX_OPEN, MAX_PATH, Meta,
    Mounted, Target, sort_entries,
};
use ext4_view::{Ext4, Ext4Error, Ext4Read, File, FileType, Metadata, Path};
use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::error::Error;
use std::rc::Rc;

/// Blocks a file may be entered at: the library walks there block by block.
const MAX_SEEK_BLOCKS: u64 = 1 << 26;

pub(super) struct ExtFs {
    fs: Ext4,
    files: HashMap<Handle, File>,
    size: u64,
    kind: &'static str,
}

struct Reader(Rc<RefCell<Cache>>);

impl Ext4Read for Reader {
    fn read(
        &mut self,
        start: u64,
        buf: &mut [u8],
    ) -> Result<(), Box<dyn Error + Send + Sync + 'static>> {
        self.0.borrow_mut().read_exact(start, buf).map_err(Into::into)
    }
}

impl ExtFs {
    pub(super) fn mount(cache: &Rc<RefCell<Cache>>) -> Result<Self, FsError> {
        let mut features = [0; 4];
        cache.borrow_mut().read_exact(1024 + 96, &mut features)?;
        // EXT4_FEATURE_INCOMPAT_EXTENTS tells ext4 from what came before it.
        let kind = if features[0] & 0x40 != 0 { "ext4" } else { "ext2" };
        let fs = Ext4::load(Box::new(Reader(Rc::clone(cache)))).map_err(error)?;
        Ok(Self { fs, files: HashMap::new(), size: cache.borrow().size(), kind })
    }

    /// The path with every symlink resolved, and what is there.
    fn resolve(&self, path: &[u8]) -> Result<(Vec<u8>, Metadata), FsError> {
        let mut todo: VecDeque<Vec<u8>> = split(path);
        let mut at = b"/".to_vec();
        let mut meta = self.lookup(&at)?;
        let mut links = 0;
        while let Some(name) = todo.pop_front() {
            if name == b".." {
                at.truncate(at.iter().rposition(|b| *b == b'/').unwrap_or(0).max(1));
                meta = self.lookup(&at)?;
                continue;
            }
            if !meta.is_dir() {
                return Err(FsError::NotFound);
            }
            let parent = at.len();
            if parent > 1 {
                at.push(b'/');
            }
            at.extend_from_slice(&name);
            if at.len() > MAX_PATH {
                return Err(FsError::TooFar);
            }
            meta = self.lookup(&at)?;
            if meta.is_symlink() {
                links += 1;
                if links > MAX_LINKS || meta.len() > MAX_PATH as u64 {
                    return Err(FsError::TooFar);
                }
                let target = self.fs.read_link(as_path(&at)?).map_err(error)?;
                let target: &[u8] = target.as_ref();
                at.truncate(if target.starts_with(b"/") { 1 } else { parent });
                meta = self.lookup(&at)?;
                for name in split(target).into_iter().rev() {
                    todo.push_front(name);
                }
                if todo.iter().map(|n| n.len() + 1).sum::<usize>() > MAX_PATH {
                    return Err(FsError::TooFar);
                }
            }
        }
        Ok((at, meta))
    }

    fn lookup(&self, path: &[u8]) -> Result<Metadata, FsError> {
        self.fs.symlink_metadata(as_path(path)?).map_err(error)
    }

    fn list(&self, path: &[u8]) -> Result<Target, FsError> {
        let mut entries = Vec::new();
        let mut left_out = 0;
        for entry in self.fs.read_dir(as_path(path)?).map_err(error)? {
            let entry = entry.map_err(error)?;
            let name: Vec<u8> = entry.file_name().as_ref().to_vec();
            if name == b"." || name == b".." {
                continue;
            }
            if entries.len() == MAX_ENTRIES {
                left_out += 1;
                continue;
            }
            // One broken inode must not hide the rest of its directory.
            let (kind, meta) = match entry.metadata() {
                Ok(meta) => (kind(meta.file_type()), stat(&meta)),
                Err(_) => (Kind::Special, Meta { len: 0, modified: None }),
            };
            entries.push(Entry { name, kind, meta });
        }
        sort_entries(&mut entries);
        Ok(Target::Dir { entries, left_out })
    }

    fn open(&mut self, path: &[u8], meta: &Metadata, handle: Handle) -> Result<Target, FsError> {
        if !meta.file_type().is_regular_file() {
            return Err(FsError::Special);
        }
        if self.files.len() >= MAX_OPEN {
            return Err(FsError::TooManyOpen);
        }
        let file = self.fs.open(as_path(path)?).map_err(error)?;
        let meta = stat(file.metadata());
        self.files.insert(handle, file);
        Ok(Target::File { handle, meta, is_index: false })
    }
}

impl Mounted for ExtFs {
    fn info(&self) -> FsInfo {
        let label = self.fs.label().display().to_string();
        let id = self.fs.uuid().to_string();
        FsInfo { kind: self.kind, label, size: self.size, id }
    }

    fn visit(&mut self, path: &[u8], index: bool, handle: Handle) -> Result<Target, FsError> {
        let (at, meta) = self.resolve(path)?;
        if !meta.is_dir() {
            return self.open(&at, &meta, handle);
        }
        if index {
            let inside = [&at[..], b"/index.html"].concat();
            if let Ok((at, meta)) = self.resolve(&inside)
                && let Ok(Target::File { meta, .. }) = self.open(&at, &meta, handle)
            {
                return Ok(Target::File { handle, meta, is_index: true });
            }
        }
        self.list(&at)
    }

    fn read(&mut self, handle: Handle, offset: u64, buf: &mut [u8]) -> Result<usize, FsError> {
        let file = self.files.get_mut(&handle).ok_or(FsError::Stale)?;
        if offset >= file.metadata().len() {
            return Ok(0);
        }
        if file.position() != offset {
            if offset / 1024 > MAX_SEEK_BLOCKS {
                return Err(FsError::TooFar);
            }
            file.seek_to(offset).map_err(error)?;
        }
        let mut done = 0;
        while done < buf.len() {
            match file.read_bytes(&mut buf[done..]).map_err(error)? {
                0 => break,
                n => done += n,
            }
        }
        Ok(done)
    }

    fn close(&mut self, handle: Handle) {
        self.files.remove(&handle);
    }
}

fn split(path: &[u8]) -> VecDeque<Vec<u8>> {
    let real = |name: &&[u8]| !name.is_empty() && *name != b".";
    path.split(|b| *b == b'/').filter(real).map(<[u8]>::to_vec).collect()
}

fn as_path(path: &[u8]) -> Result<Path<'_>, FsError> {
    Path::try_from(path).map_err(|_| FsError::NotFound)
}

fn kind(file_type: FileType) -> Kind {
    match file_type {
        FileType::Regular => Kind::File,
        FileType::Directory => Kind::Dir,
        FileType::Symlink => Kind::Link,
        _ => Kind::Special,
    }
}

fn stat(meta: &Metadata) -> Meta {
    Meta { len: meta.len(), modified: Some(meta.modified().seconds()) }
}

fn error(e: Ext4Error) -> FsError {
    match e {
        Ext4Error::NotFound | Ext4Error::NotADirectory => FsError::NotFound,
        // A name longer than 255 bytes, say: there can be no such file.
        Ext4Error::MalformedPath | Ext4Error::NotAbsolute => FsError::NotFound,
        Ext4Error::IsASpecialFile | Ext4Error::IsADirectory => FsError::Special,
        Ext4Error::PathTooLong | Ext4Error::TooManySymlinks | Ext4Error::FileTooLarge => {
            FsError::TooFar
        }
        Ext4Error::Encrypted => FsError::Unsupported("the file is encrypted".into()),
        Ext4Error::Incompatible(e) => FsError::Unsupported(e.to_string()),
        Ext4Error::Corrupt(e) => FsError::Corrupt(e.to_string()),
        Ext4Error::Io(e) => match e.downcast::<std::io::Error>() {
            Ok(e) => (*e).into(),
            Err(e) => FsError::Io(e.to_string()),
        },
        other => FsError::Corrupt(other.to_string()),
    }
}
