//! The file of a disk's trace.

use crate::image::{ImageError, Spec};
use alloc::format;
use alloc::string::String;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// A new file for the trace of a disk's operations.
#[derive(Debug)]
pub struct TraceFile {
    /// The file, which is empty.
    pub file: File,
    /// The path that was configured, for errors.
    pub path: PathBuf,
    /// The name of the disk for a replay.
    pub target: String,
}

impl TraceFile {
    /// Creates the file of a disk's trace; an existing file is never overwritten.
    ///
    /// # Errors
    /// [`ImageError::Trace`].
    pub fn create(path: &Path, spec: &Spec, disk: &str) -> Result<Self, ImageError> {
        const MOST: u32 = 1000;
        let base = if path.is_dir() { path.join(format!("{disk}.iolog")) } else { path.into() };
        let numbered = (1..MOST).map(|n| {
            let mut name = base.clone().into_os_string();
            name.push(format!(".{n}"));
            PathBuf::from(name)
        });
        let exists = || io::ErrorKind::AlreadyExists.into();
        let file = core::iter::once(base.clone())
            .chain(numbered)
            .map(File::create_new)
            .find(|made| !matches!(made, Err(e) if e.kind() == io::ErrorKind::AlreadyExists))
            .unwrap_or_else(|| Err(exists()));
        // fio separates the fields of a line by blanks.
        let target = spec.path().and_then(Path::to_str);
        let target =
            target.filter(|path| path.starts_with('/') && !path.contains(char::is_whitespace));
        let target = target.map_or_else(|| format!("/dev/{disk}"), Into::into);
        match file {
            Ok(file) => Ok(Self { file, path: base, target }),
            Err(error) => Err(ImageError::Trace { path: base, error }),
        }
    }
}
