//! A directory of many files, which are written and verified.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

use super::read;
use crate::pattern::{self, Random};

/// Executes the requests of this module; returns `None` for other verbs.
pub fn obey(verb: &str, arguments: &Value) -> Option<Result<Value>> {
    let arguments = arguments.clone();
    Some(match verb {
        "files-write" => read(arguments).and_then(write),
        "files-check" => read(arguments).and_then(check),
        _ => return None,
    })
}

#[derive(Deserialize)]
struct Files {
    folder: PathBuf,
    seed: u64,
    count: u64,
}

impl Files {
    /// Returns path, length and seed of each file; lengths are from 0 to 256 KiB.
    fn all(&self) -> impl Iterator<Item = (PathBuf, usize, u64)> {
        let mut random = Random::new(self.seed);
        (0..self.count).map(move |i| {
            let path = self.folder.join(format!("{}/{}/{i}", i % 3, i % 7));
            let longest = 1_u64 << (random.below(11) + 8);
            (path, usize::try_from(random.below(longest)).unwrap_or_default(), self.seed ^ i)
        })
    }
}

fn write(order: Files) -> Result<Value> {
    for (path, len, seed) in order.all() {
        fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
        let mut bytes = vec![0; len];
        pattern::fill(&mut bytes, seed, 0);
        fs::write(&path, bytes).with_context(|| path.display().to_string())?;
    }
    File::open(&order.folder)?.sync_all()?;
    Ok(Value::Null)
}

fn check(order: Files) -> Result<Value> {
    for (path, len, seed) in order.all() {
        let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
        ensure!(bytes.len() == len, "{} has {} bytes, not {len}", path.display(), bytes.len());
        let wrong = pattern::mismatch(&bytes, seed, 0);
        ensure!(wrong.is_none(), "{}: byte {wrong:?} is wrong", path.display());
    }
    Ok(Value::Null)
}
