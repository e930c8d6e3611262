//! Options as text, which parses to the same options.

use super::{GuardMode, LinkSpec, NicOptions};
use core::fmt::{self, Display};
use core::time::Duration;
use pvio_runtime::BucketRate;

impl Display for NicOptions {
    /// Writes the options that differ from the defaults, as [`and`](Self::and) parses them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = Words { f, first: true };
        match &self.link {
            LinkSpec::NewTap => {}
            LinkSpec::ExistingTap(name) => words.add("tap", name)?,
            LinkSpec::AfXdp(name) => words.add("afxdp", name)?,
            LinkSpec::Switch(name) => words.add("switch", name)?,
            LinkSpec::Loopback => words.word("loopback")?,
            LinkSpec::Files { record, replay } => {
                words.option("record", record.as_ref().map(|path| path.display()))?;
                words.option("replay", replay.as_ref().map(|path| path.display()))?;
            }
        }
        words.option("bridge", self.bridge.as_ref())?;
        words.option("netns", self.netns.as_ref())?;
        match self.guard {
            GuardMode::Off => {}
            GuardMode::Mac => words.add("guard", "mac")?,
            GuardMode::Ip => words.add("guard", "ip")?,
        }
        words.option("tx", self.tx.bytes.map(Rate))?;
        words.option("rx", self.rx.bytes.map(Rate))?;
        words.option("txpps", self.tx.packets.map(Rate))?;
        words.option("rxpps", self.rx.packets.map(Rate))?;
        words.option("share", self.share.as_ref())?;
        let faults = &self.faults;
        let shares = [
            ("loss", faults.lose),
            ("repeat", faults.repeat),
            ("reorder", faults.reorder),
            ("corrupt", faults.corrupt),
        ];
        for (name, millionths) in shares {
            words.option(name, Some(Percentage(millionths)).filter(|p| p.0 > 0))?;
        }
        words.option("delay", Some(Micros(faults.delay)).filter(|t| !t.0.is_zero()))?;
        words.option("jitter", Some(Micros(faults.jitter)).filter(|t| !t.0.is_zero()))?;
        words.option("seed", Some(faults.seed).filter(|seed| *seed > 0))
    }
}

/// List of options that is being written.
struct Words<'a, 'b> {
    f: &'a mut fmt::Formatter<'b>,
    first: bool,
}

impl Words<'_, '_> {
    fn word(&mut self, word: impl Display) -> fmt::Result {
        let comma = if core::mem::replace(&mut self.first, false) { "" } else { "," };
        write!(self.f, "{comma}{word}")
    }

    fn add(&mut self, key: &str, value: impl Display) -> fmt::Result {
        self.word(format_args!("{key}={value}"))
    }

    fn option(&mut self, key: &str, value: Option<impl Display>) -> fmt::Result {
        value.map_or(Ok(()), |value| self.add(key, value))
    }
}

/// Rate with its burst.
struct Rate(BucketRate);

impl Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.0.units_per_second(), self.0.burst())
    }
}

/// Percentage in millionths.
struct Percentage(u32);

impl Display for Percentage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:04}", self.0 / 10_000, self.0 % 10_000)
    }
}

/// Time in microseconds, the smallest unit of options.
struct Micros(Duration);

impl Display for Micros {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}us", self.0.as_micros())
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for NicOptions {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for NicOptions {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = alloc::string::String::deserialize(deserializer)?;
        Self::default().and(&text).map_err(serde::de::Error::custom)
    }
}
