//! Configuration of the layers that are applied before a process has threads.

use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::PathBuf;

/// Kind of a process without rights.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProcessKind {
    /// Device process of a virtual disk.
    Disk,
    /// Device process of a virtual NIC.
    Nic,
    /// Process that opens and validates disk images.
    ImageHelper,
}

impl ProcessKind {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Disk, Self::Nic, Self::ImageHelper];

    /// Returns the name of the kind.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Nic => "nic",
            Self::ImageHelper => "image-helper",
        }
    }
}

/// Unprivileged user and group.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

impl User {
    /// Returns the user of that name in `/etc/passwd`, or of the form `uid:gid`.
    ///
    /// # Errors
    /// The file cannot be read, or has no such user ([`io::ErrorKind::NotFound`]).
    pub fn named(name: &str) -> io::Result<Self> {
        let numbers = name
            .split_once(':')
            .and_then(|(uid, gid)| Some(Self { uid: uid.parse().ok()?, gid: gid.parse().ok()? }));
        match numbers {
            Some(user) => Ok(user),
            None => Self::of_passwd(&fs::read_to_string("/etc/passwd")?, name).ok_or_else(|| {
                io::Error::new(io::ErrorKind::NotFound, format!("no user {name} in /etc/passwd"))
            }),
        }
    }

    fn of_passwd(text: &str, name: &str) -> Option<Self> {
        let line = text.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2).map(str::parse);
        Some(Self { uid: fields.next()?.ok()?, gid: fields.next()?.ok()? })
    }
}

/// Namespaces that a process creates for itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[allow(clippy::struct_excessive_bools, reason = "each namespace is a separate layer")]
pub struct Namespaces {
    /// Mount namespace.
    pub mount: bool,
    /// Network namespace.
    pub network: bool,
    /// IPC namespace.
    pub ipc: bool,
    /// UTS namespace.
    pub uts: bool,
    /// Whether the parent must have started the process in a separate PID namespace.
    pub pid: bool,
    /// Whether an empty directory becomes the root. It needs the mount namespace.
    pub empty_root: bool,
}

/// Directory below which Landlock permits access.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Root {
    /// Path of the directory or file.
    #[serde(with = "any_path")]
    pub path: PathBuf,
    /// Whether files below it may be written.
    pub write: bool,
}

/// A path that need not be UTF-8.
mod any_path {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::ffi::OsString;
    use std::path::{Path, PathBuf};

    pub fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        path.as_os_str().serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
        OsString::deserialize(from).map(PathBuf::from)
    }
}

/// Access to files by path.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FileAccess {
    /// As the user may; Landlock is not applied.
    Unrestricted,
    /// Below these directories. With an empty list, no path can be opened.
    Below(Vec<Root>),
}

/// Resource limits, soft and hard. `None` leaves a limit unchanged. The limit of core dumps is always
/// 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// `RLIMIT_NOFILE`.
    pub descriptors: Option<u64>,
    /// `RLIMIT_NPROC`. It counts the threads of all processes of the user, and io_uring's worker
    /// threads.
    pub threads_of_user: Option<u64>,
    /// `RLIMIT_AS`, in bytes.
    pub address_space: Option<u64>,
    /// `RLIMIT_DATA`, in bytes.
    pub data: Option<u64>,
    /// `RLIMIT_MEMLOCK`, in bytes. Buffers registered with io_uring, and the memory of AF_XDP
    /// sockets, count per user: all processes of the user share the limit. If the process may not
    /// raise the hard limit, the soft limit is raised to the hard one.
    pub locked_memory: Option<u64>,
    /// `RLIMIT_FSIZE`, in bytes.
    pub file_size: Option<u64>,
    /// `RLIMIT_CPU`, in seconds.
    pub cpu_seconds: Option<u64>,
}

/// Layers that a process applies before it has a second thread.
///
/// [`of`](Self::of) has all of those that need no configuration.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Layers {
    /// Directory of a control group that the process joins.
    pub cgroup: Option<PathBuf>,
    /// Resource limits.
    pub limits: Limits,
    /// Namespaces.
    pub namespaces: Namespaces,
    /// User and group. `None` leaves them unchanged; capabilities are dropped nevertheless.
    pub user: Option<User>,
    /// Access to files by path.
    pub files: FileAccess,
}

const MIB: u64 = 1 << 20;

impl Layers {
    /// Returns the layers of a kind of process. The image helper has no root until some are added
    /// to [`files`](Self::files).
    #[must_use]
    pub fn of(kind: ProcessKind) -> Self {
        let is_device = kind != ProcessKind::ImageHelper;
        let limits = match kind {
            ProcessKind::Disk | ProcessKind::Nic => Limits {
                descriptors: Some(1024),
                locked_memory: Some(1024 * MIB),
                ..Limits::default()
            },
            ProcessKind::ImageHelper => Limits {
                descriptors: Some(256),
                address_space: Some(2048 * MIB),
                data: Some(512 * MIB),
                cpu_seconds: Some(600),
                ..Limits::default()
            },
        };
        let namespaces = Namespaces {
            mount: true,
            network: true,
            ipc: true,
            uts: true,
            pid: is_device,
            // The helper opens images by path.
            empty_root: is_device,
        };
        let files = FileAccess::Below(Vec::new());
        Self { cgroup: None, limits, namespaces, user: None, files }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn user_is_found_by_name_or_by_numbers() {
        let passwd = "root:x:0:0::/root:/bin/sh\npvio:x:990:991::/:/sbin/nologin\nbad:x:y:1::/:\n";
        let user = |name| User::of_passwd(passwd, name);
        assert_eq!(user("pvio"), Some(User { uid: 990, gid: 991 }));
        assert_eq!(user("pv"), None);
        assert_eq!(user("bad"), None);
        assert_eq!(User::named("5:6").unwrap(), User { uid: 5, gid: 6 });
        let error = User::named("no-such-user").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn layers_cross_processes_as_json() {
        for kind in ProcessKind::ALL {
            let layers = Layers::of(kind);
            let json = serde_json::to_string(&layers).unwrap();
            assert_eq!(serde_json::from_str::<Layers>(&json).unwrap(), layers);
        }
        let path = PathBuf::from(OsStr::from_bytes(b"/srv/\xff images"));
        let files = FileAccess::Below(vec![Root { path, write: true }]);
        let json = serde_json::to_string(&files).unwrap();
        assert_eq!(serde_json::from_str::<FileAccess>(&json).unwrap(), files);
    }
}
