//! The options' keys, and errors of options.

use alloc::borrow::Cow;
use alloc::format;
use alloc::string::String;
use pvio_ring::error::Remedy;

/// All options, with the form of their values and their meaning.
pub const KEYS: [(&str, &str, &str); 36] = [
    ("ro", "", "read-only for the guest"),
    ("rw", "", "writable, if the toolstack allows it"),
    ("direct", "", "bypasses the host's page cache (O_DIRECT)"),
    ("buffered", "", "uses the host's page cache"),
    ("overlay", "on|off", "writes go to a temporary layer, which is discarded on detach"),
    ("sector", "512|4096", "bytes of a logical sector"),
    ("physical", "BYTES", "bytes of a physical sector, 512 to 65536"),
    ("discard", "on|off", "advertises discard"),
    ("io", "normal|sqpoll|iopoll", "submission and completion mode of io_uring, for raw disks"),
    (
        "policy",
        "map|copy|persistent-or-map|persistent-or-copy",
        "data path policy: how guest pages are accessed",
    ),
    ("answers", "in-order|as-done", "no effect: responses are sent in order of completion"),
    ("queues", "N", "maximum number of queues, 1 to 256"),
    ("ring-order", "N", "maximum ring size, as a power of two of pages, 0 to 5"),
    ("indirect", "N", "maximum segments of an indirect request, 0 (none) to 4096"),
    ("iops", "N[/BURST]|none", "operations per second"),
    ("bps", "SIZE[/BURST]|none", "bytes per second"),
    ("read-iops", "N[/BURST]|none", "reads per second"),
    ("read-bps", "SIZE[/BURST]|none", "bytes read per second"),
    ("write-iops", "N[/BURST]|none", "writes and discards per second"),
    ("write-bps", "SIZE[/BURST]|none", "bytes written per second"),
    ("group", "NAME", "shares the limits with all disks of the same group"),
    ("latency", "TIME", "minimum latency of each operation: 5ms, 100us, 1s, 0"),
    ("jitter", "TIME", "maximum random addition to the latency"),
    ("fail-reads", "N", "failing reads per million"),
    ("fail-writes", "N", "failing writes and discards per million"),
    ("fail-flushes", "N", "failing flushes per million"),
    ("errno", "N", "errno of the failures, 1 to 4095; default 5 (EIO)"),
    ("seed", "N", "seed of latencies and failures, to repeat them"),
    ("on-full", "pause|error", "what happens when the storage is full; default pause"),
    ("trace", "PATH", "log of all requests for fio --read_iolog: a new file, or a directory"),
    ("busy-timeout", "TIME", "timeout for an image that is in use elsewhere; default 30s"),
    ("image-root", "DIR", "also opens files below it that the image's header names; repeatable"),
    ("write-extents", "derived|any", "which extents of a VMDK may be written"),
    ("trusted", "on|off", "trusted key: off makes the frontend use bounce buffers"),
    ("removable", "on|off", "presents the disk as removable media"),
    ("cdrom", "on|off", "presents the disk as a CD drive"),
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
