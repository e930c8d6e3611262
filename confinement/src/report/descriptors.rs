//! Open descriptors by kind.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// Counts the descriptors in `/proc/PID/fd`; `None` if it cannot be read.
pub fn descriptors(directory: &Path) -> Option<BTreeMap<String, u64>> {
    let mut counts = BTreeMap::new();
    for entry in fs::read_dir(directory).ok()? {
        let path = entry.ok()?.path();
        // One that is closed in the meantime is not counted.
        let Ok(link) = fs::read_link(&path) else { continue };
        let link = link.to_string_lossy();
        *counts.entry(kind(&link, || of_file(&path)).to_owned()).or_default() += 1;
    }
    Some(counts)
}

/// Returns the kind of a descriptor from its link.
pub fn kind(link: &str, file: impl FnOnce() -> &'static str) -> &str {
    if let Some(name) = link.strip_prefix("anon_inode:") {
        return name.trim_matches(|c| c == '[' || c == ']');
    }
    match link {
        "/dev/xen/gntdev" => "gntdev",
        "/dev/xen/evtchn" => "evtchn",
        "/dev/net/tun" => "tun",
        "/dev/null" => "null",
        _ if link.starts_with("socket:") => "socket",
        _ if link.starts_with("pipe:") => "pipe",
        _ if link.starts_with("/memfd:") => "memfd",
        _ if link.contains(":[") => "namespace",
        _ => file(),
    }
}

fn of_file(path: &Path) -> &'static str {
    let Ok(file) = fs::metadata(path) else { return "unknown" };
    let kind = file.file_type();
    match () {
        () if kind.is_file() => "file",
        () if kind.is_dir() => "directory",
        () if kind.is_block_device() => "block-device",
        () if kind.is_char_device() => "character-device",
        () if kind.is_fifo() => "fifo",
        () => "unknown",
    }
}
