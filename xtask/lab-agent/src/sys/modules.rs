//! Kernel modules, from the list in the image (lines of `NAME PATH NEEDS…`).

use std::fs::{self, File};

use anyhow::{Context, Result};
use rustix::io::Errno;

const LIST: &str = "/lab/modules";

/// Loads a module and its dependencies, except those that are already loaded.
///
/// # Errors
/// A module is not in the image, or the kernel rejects it.
pub fn load(name: &str) -> Result<()> {
    load_with(name, "")
}

/// Does as [`load`], with parameters.
pub fn load_with(name: &str, parameters: &str) -> Result<()> {
    let list = fs::read_to_string(LIST).context(LIST)?;
    insert(&list, &name.replace('-', "_"), parameters)
}

fn insert(list: &str, name: &str, parameters: &str) -> Result<()> {
    if fs::exists(format!("/sys/module/{name}"))? {
        return Ok(());
    }
    let line = list.lines().find(|line| line.split(' ').next() == Some(name));
    let mut words = line.with_context(|| format!("no module {name} in this image"))?.split(' ');
    let path = words.nth(1).context("a module's path")?;
    for need in words.filter(|word| !word.is_empty()) {
        insert(list, need, "")?;
    }
    let file = File::open(path).context(path.to_owned())?;
    let parameters = std::ffi::CString::new(parameters)?;
    match rustix::system::finit_module(&file, &parameters, 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("load {name}")),
    }
}

/// Unloads a module, if it is loaded.
///
/// # Errors
/// It is still in use after a timeout.
pub fn unload(name: &str) -> Result<()> {
    const O_NONBLOCK: i32 = 0o4000;
    let plain = std::ffi::CString::new(name.replace('-', "_"))?;
    let mut tries = 0;
    loop {
        match rustix::system::delete_module(&plain, O_NONBLOCK) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::AGAIN | Errno::BUSY) if tries < 50 => {
                tries += 1;
                std::thread::sleep(std::time::Duration::from_millis(200));
            }
            Err(error) => {
                let users = format!("/sys/module/{}/refcnt", name.replace('-', "_"));
                let users = fs::read_to_string(users).unwrap_or_default();
                let text = format!("unload {name}, which has {} users", users.trim());
                return Err(error).context(text);
            }
        }
    }
}
