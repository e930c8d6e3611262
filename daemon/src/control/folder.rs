//! Directories of control sockets.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// Returns the private directory of this user, with one subdirectory for each hosted machine.
#[must_use]
pub fn default_root() -> PathBuf {
    let own = |dir: &PathBuf| {
        // After `sudo`, the variable may name the directory of another user.
        let user = rustix::process::geteuid().as_raw();
        dir.metadata().is_ok_and(|found| found.is_dir() && found.uid() == user)
    };
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(own) {
        Some(dir) => dir.join("pvio"),
        None => std::env::temp_dir().join(format!("pvio-{}", real_user())),
    }
}

/// Returns the id of this user outside of the user namespace; inside of one, it may be root's.
fn real_user() -> u32 {
    let user = rustix::process::geteuid().as_raw();
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    mapped(user, &map).unwrap_or(user)
}

/// Returns the id outside of the user namespace, from a map with lines of `INSIDE OUTSIDE COUNT`.
fn mapped(user: u32, map: &str) -> Option<u32> {
    map.lines().find_map(|line| {
        let mut numbers = line.split_whitespace().map(|word| word.parse::<u32>().ok());
        let (inside, outside, count) = (numbers.next()??, numbers.next()??, numbers.next()??);
        let place = user.checked_sub(inside).filter(|place| *place < count)?;
        outside.checked_add(place)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uid_in_user_namespace_is_mapped_to_outer_uid() {
        assert_eq!(mapped(0, "         0          0 4294967295\n"), Some(0));
        assert_eq!(mapped(1000, "         0          0 4294967295\n"), Some(1000));
        assert_eq!(mapped(0, "         0       1000          1\n"), Some(1000));
        let container = "0 1000 1\n1 100000 65536\n";
        assert_eq!(
            [0, 1, 33].map(|user| mapped(user, container)),
            [1000, 100_000, 100_032].map(Some)
        );
        assert_eq!(mapped(70_000, container), None);
        assert_eq!(mapped(0, ""), None);
    }
}
