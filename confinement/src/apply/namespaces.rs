//! Namespaces and the root directory.

use crate::applied::{Applied, Layer, Missing, Outcome, Reason};
use crate::layers::Namespaces;
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount,
};
use rustix::process::{chdir, getegid, geteuid, getpid, pivot_root};
use rustix::thread::UnshareFlags;
use std::ffi::CStr;
use std::fs;

/// Creates the namespaces. A process that may not creates a user namespace first, in which it may.
pub fn enter(wanted: &Namespaces, applied: &mut Applied) {
    let all = [
        (Layer::MountNamespace, wanted.mount, UnshareFlags::NEWNS),
        (Layer::NetworkNamespace, wanted.network, UnshareFlags::NEWNET),
        (Layer::IpcNamespace, wanted.ipc, UnshareFlags::NEWIPC),
        (Layer::UtsNamespace, wanted.uts, UnshareFlags::NEWUTS),
    ];
    let wants_any = all.iter().any(|(_, wanted, _)| *wanted);
    let mut outcomes = all.map(|(_, wanted, flag)| wanted.then(|| unshare(flag)));
    let is_denied = |outcome: &Option<Result<(), Errno>>| *outcome == Some(Err(Errno::PERM));
    let user = if wants_any && outcomes.iter().any(is_denied) {
        let user = own_user_namespace();
        if user.is_applied() {
            for (outcome, (.., flag)) in outcomes.iter_mut().zip(all) {
                if is_denied(outcome) {
                    *outcome = Some(unshare(flag));
                }
            }
        }
        user
    } else {
        Outcome::NotConfigured
    };
    applied.record(Layer::UserNamespace, user);
    for ((layer, ..), outcome) in all.into_iter().zip(outcomes) {
        let outcome = match outcome {
            None => Outcome::NotConfigured,
            Some(done) => Outcome::of(done.map(|()| "").map_err(|e| ("unshare", e))),
        };
        applied.record(layer, outcome);
    }
    if applied.has(Layer::MountNamespace) {
        let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        // Mounts of the host reach the process, but not the reverse.
        if let Err(error) = mount_change("/", flags) {
            let outcome = Outcome::missing("separate the mounts", &error.into());
            applied.record(Layer::MountNamespace, outcome);
        }
    }
    let pid = match (wanted.pid, getpid().is_init()) {
        (false, _) => Outcome::NotConfigured,
        (true, true) => Outcome::Applied("process 1".to_owned()),
        (true, false) => Outcome::Missing(Missing {
            reason: Reason::ByParent,
            detail: "it was not started as process 1 of a namespace".to_owned(),
        }),
    };
    applied.record(Layer::PidNamespace, pid);
}

/// Creates a user namespace with the same user and group.
fn own_user_namespace() -> Outcome {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let entered = || -> Result<String, (&str, std::io::Error)> {
        unshare(UnshareFlags::NEWUSER).map_err(|e| ("unshare", e.into()))?;
        for (file, text) in [
            ("/proc/self/setgroups", "deny".to_owned()),
            ("/proc/self/uid_map", format!("{uid} {uid} 1")),
            ("/proc/self/gid_map", format!("{gid} {gid} 1")),
        ] {
            fs::write(file, text).map_err(|e| (file, e))?;
        }
        Ok(format!("uid {uid} gid {gid}"))
    };
    Outcome::of(entered())
}

/// Calls `unshare`, which affects the calling thread.
#[expect(deprecated, reason = "unsound with CLONE_FILES, which is never passed")]
pub fn unshare(namespaces: UnshareFlags) -> Result<(), Errno> {
    debug_assert!(!namespaces.contains(UnshareFlags::FILES));
    rustix::thread::unshare(namespaces)
}

/// Directories of every system over which the new root is mounted.
const PLACES: [&str; 4] = ["/run", "/tmp", "/var", "/mnt"];

/// Makes an empty, read-only file system the root. Needs a mount namespace.
pub fn empty_root() -> Outcome {
    const SIZE: &CStr = c"mode=0555,size=4096,nr_inodes=2";
    let emptied = || -> Result<String, (&str, Errno)> {
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).map_err(|e| ("separate the mounts", e))?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        let mounted = |place: &&&str| mount("tmpfs", **place, "tmpfs", flags, SIZE).is_ok();
        let place = PLACES.iter().find(mounted).ok_or(("mount a tmpfs", Errno::PERM))?;
        chdir(*place).map_err(|e| ("chdir", e))?;
        // The old root is mounted over the new one, and then detached.
        pivot_root(".", ".").map_err(|e| ("pivot_root", e))?;
        unmount(".", UnmountFlags::DETACH).map_err(|e| ("detach the old root", e))?;
        chdir("/").map_err(|e| ("chdir", e))?;
        mount_remount("/", flags | MountFlags::RDONLY, c"").map_err(|e| ("remount", e))?;
        Ok(String::new())
    };
    Outcome::of(emptied())
}
