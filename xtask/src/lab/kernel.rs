//! The guests' kernel: its ELF image from a bzImage, and modules with their dependencies.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

/// Returns the compressed kernel in a bzImage (boot protocol 2.08 and later,
/// `Documentation/arch/x86/boot.rst`: `setup_sects`, `payload_offset`, `payload_length`).
pub fn payload(image: &[u8]) -> Result<&[u8]> {
    let word = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 4).context("too short for a kernel")?;
        Ok(u32::from_le_bytes(bytes.try_into()?) as usize)
    };
    ensure!(image.get(0x202..0x206) == Some(b"HdrS"), "not a bzImage");
    let sectors = match image[0x1f1] {
        0 => 4,
        more => usize::from(more),
    };
    let start = (sectors + 1) * 512 + word(0x248)?;
    image.get(start..start + word(0x24c)?).context("the payload ends after the file")
}

/// Modules by name, in the kernel's spelling, with their paths.
pub struct Modules {
    /// The directory that contains `lib/modules`.
    root: PathBuf,
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl Modules {
    /// Finds all modules of a kernel that is unpacked below `root`.
    pub fn find(root: &Path, version: &str) -> Result<Self> {
        let dir = root.join("lib/modules").join(version);
        let mut files = BTreeMap::new();
        collect(&dir.join("kernel"), &mut files)?;
        let builtin = fs::read_to_string(dir.join("modules.builtin"))?;
        let builtin = builtin.lines().filter_map(|line| module_name(Path::new(line))).collect();
        Ok(Self { root: root.to_path_buf(), files, builtin })
    }

    /// Returns the named modules and all their dependencies, each after those it depends on:
    /// `(name, path below the root, names of dependencies)`.
    pub fn closure(&self, names: &[&str]) -> Result<Vec<(String, String, Vec<String>)>> {
        let mut done = Vec::new();
        for name in names {
            self.add(&name.replace('-', "_"), &mut done)?;
        }
        Ok(done)
    }

    fn add(&self, name: &str, done: &mut Vec<(String, String, Vec<String>)>) -> Result<()> {
        if self.builtin.contains(name) || done.iter().any(|(it, ..)| it == name) {
            return Ok(());
        }
        let file = self.files.get(name).with_context(|| format!("no kernel module {name}"))?;
        let mut needs = depends(&fs::read(file)?);
        // Modules that are requested by an alias are not in the list of dependencies.
        if matches!(name, "ext4" | "jbd2" | "libcrc32c") {
            needs.push("crc32c_generic".to_owned());
        }
        for need in &needs {
            self.add(need, done)?;
        }
        needs.retain(|need| !self.builtin.contains(need));
        let path = file.strip_prefix(&self.root)?.to_str().context("a path in UTF-8")?;
        done.push((name.to_owned(), path.to_owned(), needs));
        Ok(())
    }
}

fn collect(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if let Some(name) = module_name(&path) {
            if path.extension().is_none_or(|extension| extension != "ko") {
                bail!("{} is a compressed module, which this lab cannot read", path.display());
            }
            files.insert(name, path);
        }
    }
    Ok(())
}

fn module_name(path: &Path) -> Option<String> {
    let (stem, _) = path.file_name()?.to_str()?.split_once(".ko")?;
    Some(stem.replace('-', "_"))
}

/// Returns the dependencies in the `.modinfo` section of a module: the text after `depends=`.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let text = module[at + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(text);
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_dependencies_are_parsed() {
        assert_eq!(depends(b"ELF\0license=GPL\0depends=a,b-c\0name=d\0"), ["a", "b_c"]);
        assert_eq!(depends(b"ELF\0depends=\0name=d\0"), [""; 0]);
    }

    #[test]
    fn bzimage_payload_is_found_by_header() {
        let mut image = vec![0; 0x1000];
        image[0x1f1] = 2;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&3_u32.to_le_bytes());
        image[3 * 512 + 16..][..3].copy_from_slice(b"xyz");
        assert_eq!(payload(&image).unwrap(), b"xyz");
        assert!(payload(&image[..0x220]).is_err());
    }
}
