//! User and groups.

use crate::applied::Outcome;
use crate::layers::User;
use rustix::fs::{Gid, Uid};
use rustix::io::Errno;
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

/// Changes user and group, and drops the supplementary groups. The calls apply to one thread, which
/// is the only one.
pub fn change(user: User) -> Outcome {
    let changed = || -> Result<String, (&str, Errno)> {
        if user.uid == 0 || user.uid == u32::MAX || user.gid == u32::MAX {
            return Err(("uid", Errno::INVAL));
        }
        let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
        set_thread_groups(&[]).map_err(|e| ("setgroups", e))?;
        set_thread_res_gid(gid, gid, gid).map_err(|e| ("setresgid", e))?;
        set_thread_res_uid(uid, uid, uid).map_err(|e| ("setresuid", e))?;
        Ok(format!("uid {} gid {}", user.uid, user.gid))
    };
    Outcome::of(changed())
}
