//! What the system must provide, checked before anything starts.

use crate::failure::Failure;
use pvio_runtime::Uring;
use std::io;

/// Checks that io_uring is available, which every disk and NIC needs, and raises the limit of file
/// descriptors.
///
/// # Errors
/// A [`Failure`] that names what forbids io_uring.
pub fn prepare() -> Result<(), Failure> {
    crate::descriptors::raise_limit();
    match Uring::<pvio_runtime::PrivateBuf>::new(1) {
        Ok(_) => Ok(()),
        Err(why) => {
            let setting = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
            let setting = setting.unwrap_or_default();
            Err(no_io_uring(&why, setting.trim()))
        }
    }
}

fn no_io_uring(why: &io::Error, setting: &str) -> Failure {
    const FORBIDDEN: &str = "io_uring cannot be used";
    let denied = matches!(why.kind(), io::ErrorKind::PermissionDenied);
    match setting {
        "2" if denied => Failure::input(
            format!("{FORBIDDEN}: kernel.io_uring_disabled is 2"),
            "allow it with sysctl kernel.io_uring_disabled=0",
        ),
        "1" if denied => Failure::input(
            format!("{FORBIDDEN}: kernel.io_uring_disabled is 1, so only members of a group may"),
            "join the group that kernel.io_uring_group names, run it as root, or allow it with \
             sysctl kernel.io_uring_disabled=0",
        ),
        _ if denied || why.kind() == io::ErrorKind::Unsupported => Failure::input(
            format!(
                "{FORBIDDEN}: {why} (a container's seccomp filter, or a kernel without io_uring)"
            ),
            "allow io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile",
        ),
        _ => Failure::input(format!("io_uring cannot be set up: {why}"), ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;

    #[test]
    fn missing_io_uring_error_names_its_cause() {
        let says = |why: Errno, setting| no_io_uring(&why.into(), setting).to_string();
        assert!(says(Errno::PERM, "2").contains("sysctl kernel.io_uring_disabled=0"));
        assert!(says(Errno::PERM, "1").contains("kernel.io_uring_group"));
        assert!(says(Errno::PERM, "0").contains("seccomp"));
        assert!(says(Errno::NOSYS, "").contains("seccomp"));
        assert!(!says(Errno::NOMEM, "0").contains("seccomp"));
    }
}
