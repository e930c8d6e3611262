//! Options of a disk as an operator writes them: separated by commas, parsed only here. [`KEYS`]
//! lists all of them.

pub(super) mod values;

#[cfg(test)]
mod tests;

pub use crate::engine::IoMode;
use pvio_blkback::Config;

use crate::engine::faults::FaultPlan;
use crate::engine::throttle::{Quota, Rate, ThrottleLimits};
use crate::image::reference::ReferencePolicy;
use alloc::borrow::Cow;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use core::str::FromStr;
use core::time::Duration;
use pvio_blkback::path::Policy;
use pvio_ring::error::Remedy;
use std::path::PathBuf;
use values::{
    escaped, is_power, is_sector, number, path, plain, rate, size, switch, time, time_in_words,
};

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

/// Defines the options, with the functions that handle all of them.
macro_rules! options {
    ($($(#[$doc:meta])* $field:ident: $kind:ty,)*) => {
        /// The options of a disk, as far as given.
        #[derive(Clone, PartialEq, Eq, Debug, Default)]
        pub struct DiskOptions {
            $($(#[$doc])* pub $field: Option<$kind>,)*
        }

        impl DiskOptions {
            /// Returns these options, with `others` for those that are not set here.
            #[must_use]
            pub fn or(self, others: Self) -> Self {
                Self { $($field: self.$field.or(others.$field),)* }
            }
        }
    };
}

options! {
    /// `ro`, `rw`
    read_only: bool,
    /// `direct`, `buffered`
    direct: bool,
    /// `overlay`
    overlay: bool,
    /// `sector`, in bytes
    sector: u32,
    /// `physical`, in bytes
    physical: u32,
    /// `discard`
    discard: bool,
    /// `io`
    io: IoMode,
    /// `policy`
    policy: Policy,
    /// `answers`: in order; has no effect
    in_order: bool,
    /// `queues`
    queues: u32,
    /// `ring-order`
    ring_order: u32,
    /// `indirect`
    indirect: u32,
    /// `iops`; `Some(None)` is unlimited
    iops: Option<Rate>,
    /// `bps`
    bps: Option<Rate>,
    /// `read-iops`
    read_iops: Option<Rate>,
    /// `read-bps`
    read_bps: Option<Rate>,
    /// `write-iops`
    write_iops: Option<Rate>,
    /// `write-bps`
    write_bps: Option<Rate>,
    /// `group`
    group: String,
    /// `latency`
    latency: Duration,
    /// `jitter`
    jitter: Duration,
    /// `fail-reads`, per million
    fail_reads: u32,
    /// `fail-writes`, per million
    fail_writes: u32,
    /// `fail-flushes`, per million
    fail_flushes: u32,
    /// `errno`
    errno: i32,
    /// `seed`
    seed: u64,
    /// `trace`
    trace: PathBuf,
    /// `busy-timeout`
    busy_timeout: Duration,
    /// `image-root`, all of them
    image_roots: Vec<PathBuf>,
    /// `write-extents`: any
    write_any_extent: bool,
    /// `trusted`: evaluated by the toolstack that creates the disk
    trusted: bool,
    /// `removable`: evaluated by the toolstack that creates the disk
    removable: bool,
    /// `cdrom`: evaluated by the toolstack that creates the disk
    cdrom: bool,
}

impl DiskOptions {
    /// Returns the rate limits.
    #[must_use]
    pub fn limits(&self) -> ThrottleLimits {
        let quota = |operations: Option<Option<Rate>>, bytes: Option<Option<Rate>>| Quota {
            operations: operations.flatten(),
            bytes: bytes.flatten(),
        };
        ThrottleLimits {
            all: quota(self.iops, self.bps),
            reads: quota(self.read_iops, self.read_bps),
            writes: quota(self.write_iops, self.write_bps),
        }
    }

    /// Returns whether any limit is set, including `none`.
    #[must_use]
    pub const fn says_limits(&self) -> bool {
        self.iops.is_some()
            || self.bps.is_some()
            || self.read_iops.is_some()
            || self.read_bps.is_some()
            || self.write_iops.is_some()
            || self.write_bps.is_some()
    }

    /// Returns the policy for files that the headers of its images name.
    pub(super) fn references(&self) -> ReferencePolicy {
        ReferencePolicy {
            roots: self.image_roots.clone().unwrap_or_default(),
            write_any: self.write_any_extent.unwrap_or_default(),
        }
    }

    /// Returns the fault plan.
    #[must_use]
    pub fn faults(&self) -> FaultPlan {
        const EIO: i32 = 5;
        FaultPlan {
            latency: self.latency.unwrap_or_default(),
            jitter: self.jitter.unwrap_or_default(),
            reads: self.fail_reads.unwrap_or_default(),
            writes: self.fail_writes.unwrap_or_default(),
            flushes: self.fail_flushes.unwrap_or_default(),
            errno: self.errno.unwrap_or(EIO),
        }
    }

    /// Returns the device's settings, with `usual` for those that are not set here.
    #[must_use]
    pub fn config(&self, usual: Config) -> Config {
        Config {
            policy: self.policy.unwrap_or(usual.policy),
            max_queues: self.queues.unwrap_or(usual.max_queues),
            max_ring_page_order: self.ring_order.unwrap_or(usual.max_ring_page_order),
            max_indirect_segments: self.indirect.unwrap_or(usual.max_indirect_segments),
        }
    }

    /// Returns only the options that can be changed while the disk is served: limits, delays and
    /// failures.
    #[must_use]
    pub fn live(&self) -> Self {
        let Self { iops, bps, read_iops, read_bps, write_iops, write_bps, .. } = *self;
        let Self { latency, jitter, fail_reads, fail_writes, fail_flushes, errno, .. } = *self;
        Self {
            iops,
            bps,
            read_iops,
            read_bps,
            write_iops,
            write_bps,
            latency,
            jitter,
            fail_reads,
            fail_writes,
            fail_flushes,
            errno,
            ..Self::default()
        }
    }

    /// Returns only the options that take effect when the disk is attached.
    #[must_use]
    pub fn fixed(&self) -> Self {
        let none = Self::default();
        Self {
            iops: none.iops,
            bps: none.bps,
            read_iops: none.read_iops,
            read_bps: none.read_bps,
            write_iops: none.write_iops,
            write_bps: none.write_bps,
            latency: none.latency,
            jitter: none.jitter,
            fail_reads: none.fail_reads,
            fail_writes: none.fail_writes,
            fail_flushes: none.fail_flushes,
            errno: none.errno,
            ..self.clone()
        }
    }

    /// Parses options as [`FromStr`] does, but not necessarily in UTF-8: file names are bytes.
    ///
    /// # Errors
    /// Any [`OptionError`].
    pub fn from_bytes(text: &[u8]) -> Result<Self, OptionError> {
        let mut options = Self::default();
        let words = text.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
        for word in words.filter(|word| !word.is_empty()) {
            options.set(word)?;
        }
        Ok(options)
    }

    fn set(&mut self, word: &[u8]) -> Result<(), OptionError> {
        let (key, value) = match word.iter().position(|byte| *byte == b'=') {
            Some(at) => (word.get(..at).unwrap_or_default(), word.get(at + 1..)),
            None => (word, None),
        };
        let Some(&(key, form, _)) = KEYS.iter().find(|(known, ..)| known.as_bytes() == key) else {
            return Err(OptionError::Unknown(String::from_utf8_lossy(key).into_owned()));
        };
        if form.is_empty() {
            if value.is_some() {
                return Err(OptionError::Flag(key));
            }
            match key {
                "ro" => self.read_only = Some(true),
                "rw" => self.read_only = Some(false),
                "direct" => self.direct = Some(true),
                _ => self.direct = Some(false),
            }
            return Ok(());
        }
        // A switch without a value is on.
        let value = value.unwrap_or(if form == "on|off" { b"on" } else { b"" });
        let set = match key {
            "trace" => path(value).map(|path| self.trace = Some(path)),
            "image-root" => {
                path(value).map(|path| self.image_roots.get_or_insert_default().push(path))
            }
            _ => core::str::from_utf8(value).ok().and_then(|value| self.set_value(key, value)),
        };
        set.ok_or_else(|| OptionError::Value {
            key,
            value: String::from_utf8_lossy(value).into_owned(),
            form,
        })
    }

    fn set_value(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "overlay" => self.overlay = Some(switch(value)?),
            "sector" => self.sector = Some(number(value, 512, 4096).filter(is_sector)?),
            "physical" => self.physical = Some(number(value, 512, 65536).filter(is_power)?),
            "discard" => self.discard = Some(switch(value)?),
            "io" => {
                self.io = Some(match value {
                    "normal" => IoMode::Normal,
                    "sqpoll" => IoMode::SqPoll,
                    "iopoll" => IoMode::IoPoll,
                    _ => return None,
                });
            }
            "policy" => self.policy = Some(value.parse().ok()?),
            "answers" => {
                self.in_order = Some(match value {
                    "in-order" => true,
                    "as-done" => false,
                    _ => return None,
                });
            }
            "queues" => self.queues = Some(number(value, 1, 256)?),
            "ring-order" => self.ring_order = Some(number(value, 0, 5)?),
            "indirect" => self.indirect = Some(number(value, 0, 4096)?),
            "iops" => self.iops = Some(rate(value, plain)?),
            "bps" => self.bps = Some(rate(value, size)?),
            "read-iops" => self.read_iops = Some(rate(value, plain)?),
            "read-bps" => self.read_bps = Some(rate(value, size)?),
            "write-iops" => self.write_iops = Some(rate(value, plain)?),
            "write-bps" => self.write_bps = Some(rate(value, size)?),
            "group" if value.is_empty() => return None,
            "group" => self.group = Some(value.to_string()),
            "latency" => self.latency = Some(time(value)?),
            "jitter" => self.jitter = Some(time(value)?),
            "fail-reads" => self.fail_reads = Some(number(value, 0, 1_000_000)?),
            "fail-writes" => self.fail_writes = Some(number(value, 0, 1_000_000)?),
            "fail-flushes" => self.fail_flushes = Some(number(value, 0, 1_000_000)?),
            "errno" => self.errno = Some(i32::try_from(number(value, 1, 4095)?).ok()?),
            "seed" => self.seed = Some(value.parse().ok()?),
            "busy-timeout" => self.busy_timeout = Some(time(value)?),
            "write-extents" => {
                self.write_any_extent = Some(match value {
                    "derived" => false,
                    "any" => true,
                    _ => return None,
                });
            }
            "trusted" => self.trusted = Some(switch(value)?),
            "removable" => self.removable = Some(switch(value)?),
            "cdrom" => self.cdrom = Some(switch(value)?),
            _ => return None,
        }
        Some(())
    }

    /// Returns the options as strings that are parsed to the same.
    fn words(&self) -> Vec<String> {
        let mut words = Vec::new();
        let flag =
            |on: Option<bool>, [yes, no]: [&'static str; 2]| on.map(|on| if on { yes } else { no });
        words.extend(flag(self.read_only, ["ro", "rw"]).map(String::from));
        words.extend(flag(self.direct, ["direct", "buffered"]).map(String::from));
        let mut put = |key: &str, value: Option<String>| {
            words.extend(value.map(|value| format!("{key}={value}")));
        };
        let on_off = |on: Option<bool>| flag(on, ["on", "off"]).map(String::from);
        let text = |number: Option<u32>| number.map(|n| n.to_string());
        put("overlay", on_off(self.overlay));
        put("sector", text(self.sector));
        put("physical", text(self.physical));
        put("discard", on_off(self.discard));
        put("io", self.io.map(|io| io.word().into()));
        put("policy", self.policy.map(|policy| policy.to_string()));
        put("answers", flag(self.in_order, ["in-order", "as-done"]).map(String::from));
        put("queues", text(self.queues));
        put("ring-order", text(self.ring_order));
        put("indirect", text(self.indirect));
        for (key, rate) in [
            ("iops", self.iops),
            ("bps", self.bps),
            ("read-iops", self.read_iops),
            ("read-bps", self.read_bps),
            ("write-iops", self.write_iops),
            ("write-bps", self.write_bps),
        ] {
            put(
                key,
                rate.map(|rate| {
                    rate.map_or("none".into(), |r| format!("{}/{}", r.per_second, r.burst))
                }),
            );
        }
        put("group", self.group.clone());
        put("latency", self.latency.map(time_in_words));
        put("jitter", self.jitter.map(time_in_words));
        put("fail-reads", text(self.fail_reads));
        put("fail-writes", text(self.fail_writes));
        put("fail-flushes", text(self.fail_flushes));
        put("errno", self.errno.map(|n| n.to_string()));
        put("seed", self.seed.map(|n| n.to_string()));
        put("trace", self.trace.as_deref().map(escaped));
        for root in self.image_roots.iter().flatten() {
            put("image-root", Some(escaped(root)));
        }
        put("write-extents", flag(self.write_any_extent, ["any", "derived"]).map(String::from));
        put("busy-timeout", self.busy_timeout.map(time_in_words));
        put("trusted", on_off(self.trusted));
        put("removable", on_off(self.removable));
        put("cdrom", on_off(self.cdrom));
        words
    }
}

impl FromStr for DiskOptions {
    type Err = OptionError;

    /// Parses options that are separated by commas; an empty string sets none. If an option is
    /// repeated, the last value is used, except for `image-root`, which accumulates.
    fn from_str(text: &str) -> Result<Self, OptionError> {
        Self::from_bytes(text.as_bytes())
    }
}

/// Formats the options so that they are parsed to the same.
impl fmt::Display for DiskOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words().join(","))
    }
}
