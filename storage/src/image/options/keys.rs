//! The options' keys, and errors of options.

use alloc::borrow::Cow;
use alloc::format;
use alloc::string::String;
use pvio_ring::error::Remedy;

/// All options, with the form of their values and their meaning.
pub const KEYS: [(&str, &str, &str); 35] = [
    ("ro", "", "the guest may only read it"),
    ("rw", "", "the guest may write it, if the toolstack lets it"),
    ("direct", "", "around the host's page cache (O_DIRECT)"),
    ("buffered", "", "through the host's page cache"),
    ("overlay", "on|off", "what is written is kept aside and forgotten"),
    ("sector", "512|4096", "bytes of a logical sector"),
    ("physical", "BYTES", "bytes of a physical sector, 512 to 65536"),
    ("discard", "on|off", "whether discards are offered"),
    ("io", "normal|sqpoll|iopoll", "how io_uring is told of requests; for raw disks"),
    ("policy", "map|copy|persistent-or-map|persistent-or-copy", "how data reaches the guest"),
    ("answers", "in-order|as-done", "no effect: requests are answered as they are done"),
    ("queues", "N", "queues at most, 1 to 256"),
    ("ring-order", "N", "a ring has at most 2 to this power pages, 0 to 5"),
    ("indirect", "N", "segments of an indirect request at most, 0 to 4096; 0 is none"),
    ("iops", "N[/BURST]|none", "operations a second"),
    ("bps", "SIZE[/BURST]|none", "bytes a second"),
    ("read-iops", "N[/BURST]|none", "reads a second"),
    ("read-bps", "SIZE[/BURST]|none", "bytes read a second"),
    ("write-iops", "N[/BURST]|none", "writes and discards a second"),
    ("write-bps", "SIZE[/BURST]|none", "bytes written a second"),
    ("group", "NAME", "limits are shared with all disks that name the same group"),
    ("latency", "TIME", "what every operation takes at least: 5ms, 100us, 1s, 0"),
    ("jitter", "TIME", "what it takes more at most"),
    ("fail-reads", "N", "of a million reads, how many fail"),
    ("fail-writes", "N", "of a million writes and discards, how many fail"),
    ("fail-flushes", "N", "of a million flushes, how many fail"),
    ("errno", "N", "the error they fail with, 1 to 4095; 5 (EIO) if left out"),
    ("seed", "N", "makes the same failures again"),
    ("trace", "PATH", "a log of all requests for fio --read_iolog: a new file, or a directory"),
    ("busy-timeout", "TIME", "how long an image in use elsewhere is waited for; 30s if left out"),
    (
        "image-root",
        "DIR",
        "files that the image's header names are opened below it too; repeatable",
    ),
    ("write-extents", "derived|any", "which files a VMDK may name to be written"),
    ("trusted", "on|off", "whether the frontend may let the backend see its pages"),
    ("removable", "on|off", "whether the guest should take it for a removable medium"),
    ("cdrom", "on|off", "whether the guest should take it for a CD drive"),
];

/// The options are invalid.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OptionError {
    /// The option does not exist.
    #[error("unknown option {0:?} of a disk")]
    Unknown(String),
    /// The value is missing or invalid.
    #[error("invalid value {value:?} of the option {key} of a disk")]
    Value {
        /// The option.
        key: &'static str,
        /// The given value.
        value: String,
        /// The form of valid values.
        form: &'static str,
    },
    /// The option takes no value.
    #[error("the option {0} of a disk takes no value")]
    Flag(&'static str),
    /// The closing bracket is missing.
    #[error("the closing bracket of a disk's options is missing")]
    Unclosed,
}

impl Remedy for OptionError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        Some(match self {
            Self::Unknown(_) => format!("use {}", KEYS.map(|(key, ..)| key).join(", ")).into(),
            Self::Value { key, form, .. } => format!("write {key}={form}").into(),
            Self::Flag(key) => format!("write {key} alone").into(),
            Self::Unclosed => "write [iops=100,direct]PATH".into(),
        })
    }
}
