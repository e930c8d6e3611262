//! Resource limits and core dumps.

use crate::applied::Outcome;
use crate::layers::Limits;
use rustix::io::Errno;
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit,
};
use std::fmt::Write;

/// Sets soft and hard limits.
pub fn set(limits: &Limits) -> Outcome {
    let all = [
        ("core", Resource::Core, Some(0)),
        ("nofile", Resource::Nofile, limits.descriptors),
        ("nproc", Resource::Nproc, limits.threads_of_user),
        ("as", Resource::As, limits.address_space),
        ("data", Resource::Data, limits.data),
        ("memlock", Resource::Memlock, limits.locked_memory),
        ("fsize", Resource::Fsize, limits.file_size),
        ("cpu", Resource::Cpu, limits.cpu_seconds),
    ];
    let set = || -> Result<String, (&str, Errno)> {
        let mut detail = String::new();
        for (name, resource, value) in all {
            let Some(value) = value else { continue };
            let value = set_one(resource, value).map_err(|error| (name, error))?;
            let space = if detail.is_empty() { "" } else { " " };
            let _ = write!(detail, "{space}{name}={value}");
        }
        Ok(detail)
    };
    Outcome::of(set())
}

/// Returns the value that was set: at most the hard limit, if that may not be raised.
fn set_one(resource: Resource, value: u64) -> Result<u64, Errno> {
    let both = |value| Rlimit { current: Some(value), maximum: Some(value) };
    match setrlimit(resource, both(value)) {
        Ok(()) => Ok(value),
        Err(Errno::PERM) => {
            let most = getrlimit(resource).maximum.unwrap_or(value).min(value);
            setrlimit(resource, both(most)).map(|()| most)
        }
        Err(error) => Err(error),
    }
}

/// Forbids core dumps, and tracing by processes of the same user.
pub fn forbid_dumps() -> Outcome {
    let set = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    Outcome::of(set.map(|()| "").map_err(|e| ("PR_SET_DUMPABLE", e)))
}
