//! Options of a vif beyond those of `xl`. The grammar is the same wherever options are given.
//!
//! Options are separated by commas. Those that select what the vif is connected to are fixed for
//! its lifetime; all others can be changed while it runs.
//!
//! | option | effect | default |
//! |---|---|---|
//! | `bridge=NAME` | joins this bridge, of the kernel or of Open vSwitch | the toolstack's |
//! | `tap=NAME` | uses this existing, configured tap | a new tap |
//! | `afxdp=NAME` | uses the queues of this network interface by AF_XDP, without a tap | a tap |
//! | `switch=NAME` | joins this switch of this process, without a tap | a tap |
//! | `netns=NAME` | network namespace (`ip netns`) of the tap or of the `afxdp` interface | this process's |
//! | `loopback` | the guest receives what it sends | a tap |
//! | `record=PATH` | writes the packets that the guest sends to this file | a tap |
//! | `replay=PATH` | sends the packets of this file to the guest | no packets |
//! | `guard=off\|mac\|ip` | drops packets with other source addresses | `off` |
//! | `tx=RATE`, `rx=RATE` | bytes per second from, to the guest: `10M`, with burst `10M/64k` | no limit |
//! | `txpps=RATE`, `rxpps=RATE` | packets per second | no limit |
//! | `share=NAME` | uses the shared rate of that name | – |
//! | `loss=P`, `repeat=P`, `reorder=P`, `corrupt=P` | percentage of packets: `1`, `0.5%` | none |
//! | `delay=T`, `jitter=T` | `5ms`, `200us` | none |
//! | `seed=N` | seed of these faults | 0 |
//!
//! `k`, `M` and `G` are powers of 1000. `none` removes a limit or a shared rate that an earlier
//! source set.
#![forbid(unsafe_code)]

mod text;

use crate::wrappers::faults::FaultPlan;
use crate::wrappers::shape::DirectionLimits;
use alloc::borrow::Cow;
use alloc::string::String;
use core::time::Duration;
use pvio_ring::error::Remedy;
use pvio_runtime::BucketRate;
use std::path::PathBuf;

/// Options of a vif.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NicOptions {
    /// What the vif is connected to.
    pub link: LinkSpec,
    /// Bridge that a tap joins, if the toolstack names none.
    pub bridge: Option<String>,
    /// Network namespace of the tap.
    pub netns: Option<String>,
    /// Filter of source addresses.
    pub guard: GuardMode,
    /// Limits of the direction from the guest.
    pub tx: DirectionLimits,
    /// Limits of the direction to the guest.
    pub rx: DirectionLimits,
    /// Name of the shared rate.
    pub share: Option<String>,
    /// Fault injection.
    pub faults: FaultPlan,
}

/// What a vif is connected to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum LinkSpec {
    /// A new tap.
    #[default]
    NewTap,
    /// An existing tap, by name.
    ExistingTap(String),
    /// The queues of a network interface, by name.
    AfXdp(String),
    /// A switch of this process, by name.
    Switch(String),
    /// Loopback to the guest.
    Loopback,
    /// Files.
    Files {
        /// File to which the guest's packets are written.
        record: Option<PathBuf>,
        /// File whose packets are sent to the guest.
        replay: Option<PathBuf>,
    },
}

/// Source addresses that a guest is restricted to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum GuardMode {
    /// No restriction.
    #[default]
    Off,
    /// The MAC address that the toolstack assigned.
    Mac,
    /// That address, and the assigned IP addresses.
    Ip,
}

/// Error: an option that is unknown or has an invalid value.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("invalid option {word:?} of a NIC: expected {expected}")]
pub struct BadOption {
    word: String,
    expected: &'static str,
}

impl Remedy for BadOption {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        Some("see the options in docs/nics.md".into())
    }
}

impl NicOptions {
    /// Returns these options, overridden by those in `words`.
    ///
    /// # Errors
    /// A [`BadOption`] for the first invalid option.
    pub fn and(mut self, words: &str) -> Result<Self, BadOption> {
        for word in words.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            self.take(word).map_err(|expected| BadOption { word: word.into(), expected })?;
        }
        Ok(self)
    }

    /// Whether a link that was opened with `other` is the one that these options select.
    pub(super) fn has_link_of(&self, other: &Self) -> bool {
        self.link == other.link && self.bridge == other.bridge && self.netns == other.netns
    }

    fn take(&mut self, word: &str) -> Result<(), &'static str> {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        match key {
            "bridge" => self.bridge = Some(named(value)?),
            "tap" => self.link = LinkSpec::ExistingTap(named(value)?),
            "afxdp" => self.link = LinkSpec::AfXdp(named(value)?),
            "switch" => self.link = LinkSpec::Switch(named(value)?),
            "netns" => self.netns = Some(named(value)?),
            "loopback" if word == key => self.link = LinkSpec::Loopback,
            "record" => *self.files().0 = Some(path(value)?),
            "replay" => *self.files().1 = Some(path(value)?),
            "guard" => {
                self.guard = match value {
                    "off" => GuardMode::Off,
                    "mac" => GuardMode::Mac,
                    "ip" => GuardMode::Ip,
                    _ => return Err("guard=off, guard=mac or guard=ip"),
                }
            }
            "tx" => self.tx.bytes = rate(value, BYTES_AT_ONCE)?,
            "rx" => self.rx.bytes = rate(value, BYTES_AT_ONCE)?,
            "txpps" => self.tx.packets = rate(value, PACKETS_AT_ONCE)?,
            "rxpps" => self.rx.packets = rate(value, PACKETS_AT_ONCE)?,
            "share" if value == "none" => self.share = None,
            "share" => self.share = Some(named(value)?),
            "loss" => self.faults.lose = of_a_million(value)?,
            "repeat" => self.faults.repeat = of_a_million(value)?,
            "reorder" => self.faults.reorder = of_a_million(value)?,
            "corrupt" => self.faults.corrupt = of_a_million(value)?,
            "delay" => self.faults.delay = time(value)?,
            "jitter" => self.faults.jitter = time(value)?,
            "seed" => self.faults.seed = value.parse().map_err(|_| "a whole number")?,
            _ => {
                return Err(
                    "one of bridge, tap, afxdp, switch, netns, loopback, record, replay, guard, \
                    tx, rx, txpps, rxpps, share, loss, repeat, reorder, corrupt, delay, jitter and seed",
                );
            }
        }
        Ok(())
    }

    fn files(&mut self) -> (&mut Option<PathBuf>, &mut Option<PathBuf>) {
        if !matches!(self.link, LinkSpec::Files { .. }) {
            self.link = LinkSpec::Files { record: None, replay: None };
        }
        match &mut self.link {
            LinkSpec::Files { record, replay } => (record, replay),
            _ => unreachable!("it was made so"),
        }
    }
}

/// Parses a rate: `10M`, or `10M/64k` with a burst.
///
/// # Errors
/// A description of the expected format.
pub fn shared_rate(text: &str) -> Result<BucketRate, &'static str> {
    rate(text, BYTES_AT_ONCE)?.ok_or("a rate other than none")
}

/// Smallest default burst in bytes. The default burst is the amount of a twentieth of a second.
const BYTES_AT_ONCE: u64 = 128 * 1024;
const PACKETS_AT_ONCE: u64 = 64;

fn rate(text: &str, least: u64) -> Result<Option<BucketRate>, &'static str> {
    if text == "none" {
        return Ok(None);
    }
    let (per_second, burst) = match text.split_once('/') {
        None => (text, None),
        Some((per_second, burst)) => (per_second, Some(burst)),
    };
    let per_second = count(per_second)?;
    let usual = per_second.wrapping_div(20).max(least);
    let burst = burst.map_or(Ok(usual), count)?;
    Ok(Some(BucketRate::per_second(per_second, burst)))
}

fn count(text: &str) -> Result<u64, &'static str> {
    const EXPECTED: &str = "a rate per second of at least 1, as in 500, 10M or 1G/64k, or none";
    let (digits, unit) = match text.strip_suffix(['k', 'M', 'G']) {
        None => (text, 1),
        Some(digits) if text.ends_with('k') => (digits, 1_000),
        Some(digits) if text.ends_with('M') => (digits, 1_000_000),
        Some(digits) => (digits, 1_000_000_000_u64),
    };
    let number: Option<u64> = digits.parse().ok();
    number.and_then(|n| n.checked_mul(unit)).filter(|n| *n > 0).ok_or(EXPECTED)
}

fn named(text: &str) -> Result<String, &'static str> {
    let fits = (1..=64).contains(&text.len()) && !text.starts_with('.');
    let plain = text.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
    if fits && plain { Ok(text.into()) } else { Err("a name of up to 64 characters") }
}

fn path(text: &str) -> Result<PathBuf, &'static str> {
    if text.starts_with('/') { Ok(text.into()) } else { Err("an absolute path") }
}

fn of_a_million(text: &str) -> Result<u32, &'static str> {
    const EXPECTED: &str = "a percentage from 0 to 100, as in 1, 0.5 or 0.01%";
    let number: f64 = text.strip_suffix('%').unwrap_or(text).parse().map_err(|_| EXPECTED)?;
    // Between 0 and a million, so it fits a `u32`.
    if (0.0..=100.0).contains(&number) {
        Ok((number * 10_000.0).round() as u32)
    } else {
        Err(EXPECTED)
    }
}

fn time(text: &str) -> Result<Duration, &'static str> {
    const EXPECTED: &str = "a time of up to a minute, as in 5ms or 200us";
    let micros = match (text.strip_suffix("us"), text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(n), ..) => (n, 1_u64),
        (_, Some(n), _) => (n, 1_000),
        (_, _, Some(n)) => (n, 1_000_000),
        _ if text == "0" => (text, 1),
        _ => return Err(EXPECTED),
    };
    let number: u64 = micros.0.parse().map_err(|_| EXPECTED)?;
    let time = Duration::from_micros(number.saturating_mul(micros.1));
    if time <= Duration::from_secs(60) { Ok(time) } else { Err(EXPECTED) }
}

#[cfg(test)]
mod tests;
