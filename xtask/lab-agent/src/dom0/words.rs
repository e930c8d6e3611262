//! Logs for the report of a scenario that failed: the last console lines of its guests, and pvio's
//! log since its start.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use serde_json::{Value, json};

use super::backend::{PVIO_LOG, PVIO_OUTPUT};

/// Guests are dropped when an error ends a scenario, so their console lines are stored here.
static GUESTS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Stores console lines of a guest.
pub fn keep(guest: &str, lines: &[String]) {
    let mut kept = GUESTS.lock().unwrap_or_else(PoisonError::into_inner);
    kept.extend(lines.iter().map(|line| format!("{guest}: {line}")));
}

/// Sizes of the logs when a scenario started.
#[derive(Default)]
pub struct Words {
    log: u64,
    output: u64,
}

impl Words {
    /// Records the current sizes, and discards the lines of earlier scenarios.
    pub fn start() -> Self {
        GUESTS.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let size = |path: &str| Path::new(path).metadata().map_or(0, |it| it.len());
        Self { log: size(PVIO_LOG), output: size(PVIO_OUTPUT) }
    }

    /// Returns everything that was logged since.
    pub fn all(&self) -> Value {
        let guests = GUESTS.lock().unwrap_or_else(PoisonError::into_inner);
        json!({
            "guest": *guests,
            "pvio": since(PVIO_LOG, self.log),
            "pvio_output": since(PVIO_OUTPUT, self.output),
            "device_model": newest_device_model().map_or_else(Vec::new, |path| since(&path, 0)),
        })
    }
}

/// Returns the log of the device model that was started last.
fn newest_device_model() -> Option<String> {
    let logs = std::fs::read_dir("/var/log/xen").ok()?.flatten();
    let logs = logs.filter(|log| log.file_name().to_string_lossy().starts_with("qemu-dm-"));
    let newest = logs.max_by_key(|log| log.metadata().and_then(|it| it.modified()).ok())?;
    Some(newest.path().display().to_string())
}

/// Returns the last lines of a file after the offset `size`.
fn since(path: &str, size: u64) -> Vec<String> {
    let mut bytes = Vec::new();
    if let Ok(mut file) = File::open(path) {
        let _ = file.seek(SeekFrom::Start(size));
        let _ = file.read_to_end(&mut bytes);
    }
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().map(|line| line.chars().take(240).collect()).collect();
    lines[lines.len().saturating_sub(60)..].to_vec()
}
