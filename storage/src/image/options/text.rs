//! Options as text: parsing and formatting.

use super::values::{
    escaped, is_power, is_sector, number, path, plain, rate, size, switch, time, time_in_words,
};
use super::{DiskOptions, IoMode, KEYS, OptionError};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use core::str::FromStr;

impl DiskOptions {
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
            "on-full" => {
                self.pause_when_full = Some(match value {
                    "pause" => true,
                    "error" => false,
                    _ => return None,
                });
            }
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
                    rate.map_or("none".into(), |r| {
                        format!("{}/{}", r.units_per_second(), r.burst())
                    })
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
        put("on-full", flag(self.pause_when_full, ["pause", "error"]).map(String::from));
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

#[cfg(feature = "serde")]
impl serde::Serialize for DiskOptions {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for DiskOptions {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = <String as serde::Deserialize>::deserialize(from)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Formats the options so that they are parsed to the same.
impl fmt::Display for DiskOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words().join(","))
    }
}
