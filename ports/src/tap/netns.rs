//! Running code in another network namespace.
#![forbid(unsafe_code)]

use super::config::TapError;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::os::fd::AsFd;

/// Runs `work` in the network namespace of that name, on a temporary thread that enters it.
///
/// # Errors
/// [`TapError::NoNamespace`], or the error of `work`.
pub fn inside<T: Send>(
    name: &str,
    work: impl FnOnce() -> Result<T, TapError> + Send,
) -> Result<T, TapError> {
    let none = |errno| TapError::NoNamespace { name: name.into(), errno };
    let path = alloc::format!("/run/netns/{name}");
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let space = rustix::fs::open(path, flags, Mode::empty()).map_err(none)?;
    let enter = || {
        move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network)).map_err(none)?;
        work()
    };
    let gone = || Err(none(Errno::AGAIN));
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, enter);
        thread.map_or_else(|_| gone(), |thread| thread.join().unwrap_or_else(|_| gone()))
    })
}
