//! What can be said of a vif beyond what `xl` knows: one grammar, wherever it is said.
//!
//! Words with commas between. Those that say where a vif leads to hold for as long as it is there;
//! all others can be changed while it is served.
//!
//! | word | means | if left out |
//! |---|---|---|
//! | `bridge=NAME` | joins this bridge, the kernel's or Open vSwitch's | the toolstack's |
//! | `tap=NAME` | that tap, which somebody made and set up | one made here |
//! | `afxdp=NAME` | on the queues of that network interface, by AF_XDP: no tap | a tap |
//! | `switch=NAME` | plugged into that switch of this process: no tap | a tap |
//! | `netns=NAME` | the tap, or the interface of `afxdp`, is in that network namespace (`ip netns`) | this one |
//! | `loopback` | the guest receives what it sends | a tap |
//! | `record=PATH` | what the guest sends goes to that file | a tap |
//! | `replay=PATH` | and what is in that one comes to it | nothing comes |
//! | `guard=off\|mac\|ip` | drops what is sent under other addresses | `off` |
//! | `tx=RATE`, `rx=RATE` | bytes a second from the guest, to it: `10M`, with a burst `10M/64k` | no limit |
//! | `txpps=RATE`, `rxpps=RATE` | packets a second | no limit |
//! | `share=NAME` | shares the rate of that name with others | – |
//! | `loss=P`, `repeat=P`, `reorder=P`, `corrupt=P` | per cent of packets: `1`, `0.5%` | none |
//! | `delay=T`, `jitter=T` | `5ms`, `200us` | none |
//! | `seed=N` | of the chance in these | 0 |
//!
//! `k`, `M` and `G` are thousands. `none` takes a limit or a share away that was said before.
#![forbid(unsafe_code)]

use super::faults::FaultPlan;
use super::shape::{DirectionLimits, Rate};
use alloc::string::String;
use core::time::Duration;
use std::path::PathBuf;

/// What was said of a vif.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NicOptions {
    /// Where it leads to, if not to a tap.
    pub plug: Plug,
    /// The bridge a tap joins, if the toolstack names none.
    pub bridge: Option<String>,
    /// The network namespace of the tap.
    pub netns: Option<String>,
    /// What the guest may send.
    pub guard: GuardBy,
    /// Limits on what comes from the guest.
    pub tx: DirectionLimits,
    /// Limits on what goes to it.
    pub rx: DirectionLimits,
    /// The rate it shares, by name.
    pub share: Option<String>,
    /// What the wire does to packets.
    pub faults: FaultPlan,
}

/// Where a vif leads to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Plug {
    /// A tap.
    #[default]
    Tap,
    /// A tap that is there already, by name.
    Opened(String),
    /// The queues of a network interface, by name.
    AfXdp(String),
    /// A switch of this process, by name.
    Switch(String),
    /// Back to the guest.
    Loopback,
    /// Files.
    Files {
        /// What the guest sends goes there.
        record: Option<PathBuf>,
        /// What it receives comes from there.
        replay: Option<PathBuf>,
    },
}

/// By what a guest is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum GuardBy {
    /// Nothing: it may send what it likes.
    #[default]
    Nothing,
    /// The MAC address the toolstack gave it.
    Mac,
    /// That, and its IP addresses.
    Ip,
}

/// A word that is none of the grammar.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{word:?} cannot be said of a NIC: {expected}")]
pub struct BadOption {
    word: String,
    expected: &'static str,
}

impl NicOptions {
    /// These options, and what the words say instead.
    ///
    /// # Errors
    /// The first [`BadOption`].
    pub fn and(mut self, words: &str) -> Result<Self, BadOption> {
        for word in words.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            self.take(word).map_err(|expected| BadOption { word: word.into(), expected })?;
        }
        Ok(self)
    }

    fn take(&mut self, word: &str) -> Result<(), &'static str> {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        match key {
            "bridge" => self.bridge = Some(named(value)?),
            "tap" => self.plug = Plug::Opened(named(value)?),
            "afxdp" => self.plug = Plug::AfXdp(named(value)?),
            "switch" => self.plug = Plug::Switch(named(value)?),
            "netns" => self.netns = Some(named(value)?),
            "loopback" if word == key => self.plug = Plug::Loopback,
            "record" => *self.files().0 = Some(path(value)?),
            "replay" => *self.files().1 = Some(path(value)?),
            "guard" => {
                self.guard = match value {
                    "off" => GuardBy::Nothing,
                    "mac" => GuardBy::Mac,
                    "ip" => GuardBy::Ip,
                    _ => return Err("guard is off, mac or ip"),
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
                    "known are bridge, tap, afxdp, switch, netns, loopback, record, replay, guard, \
                    tx, rx, txpps, rxpps, share, loss, repeat, reorder, corrupt, delay, jitter, seed",
                );
            }
        }
        Ok(())
    }

    fn files(&mut self) -> (&mut Option<PathBuf>, &mut Option<PathBuf>) {
        if !matches!(self.plug, Plug::Files { .. }) {
            self.plug = Plug::Files { record: None, replay: None };
        }
        match &mut self.plug {
            Plug::Files { record, replay } => (record, replay),
            _ => unreachable!("it was made so"),
        }
    }
}

/// A rate as it is said: `10M`, or with what may go at once `10M/64k`.
///
/// # Errors
/// What it should be.
pub fn shared_rate(text: &str) -> Result<Rate, &'static str> {
    rate(text, BYTES_AT_ONCE)?.ok_or("a shared rate cannot be none")
}

/// What may go at once, if nothing is said, is a twentieth of a second's, and this at least.
const BYTES_AT_ONCE: u64 = 128 * 1024;
const PACKETS_AT_ONCE: u64 = 64;

fn rate(text: &str, least: u64) -> Result<Option<Rate>, &'static str> {
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
    Ok(Some(Rate { per_second, burst }))
}

fn count(text: &str) -> Result<u64, &'static str> {
    const EXPECTED: &str = "a number a second, at least 1, as in 500, 10M or 1G/64k; or none";
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
    if fits && plain { Ok(text.into()) } else { Err("a name is wanted, of up to 64 characters") }
}

fn path(text: &str) -> Result<PathBuf, &'static str> {
    if text.starts_with('/') { Ok(text.into()) } else { Err("an absolute path is wanted") }
}

fn of_a_million(text: &str) -> Result<u32, &'static str> {
    const EXPECTED: &str = "per cent are wanted, 0 to 100, as in 1, 0.5 or 0.01%";
    let number: f64 = text.strip_suffix('%').unwrap_or(text).parse().map_err(|_| EXPECTED)?;
    // Between 0 and a million, so it fits.
    if (0.0..=100.0).contains(&number) { Ok((number * 10_000.0) as u32) } else { Err(EXPECTED) }
}

fn time(text: &str) -> Result<Duration, &'static str> {
    const EXPECTED: &str = "a time of up to a minute is wanted, as in 5ms or 200us";
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
mod tests {
    use super::*;
    use alloc::string::ToString;

    fn said(words: &str) -> NicOptions {
        NicOptions::default().and(words).unwrap()
    }

    #[test]
    fn words_say_what_they_do() {
        assert_eq!(said(""), NicOptions::default());
        let o = said("guard=ip, tx=10M/64k,rx=1G,txpps=500,share=up,switch=lan");
        let bytes = |per_second, burst| Some(Rate { per_second, burst });
        assert_eq!(o.guard, GuardBy::Ip);
        assert_eq!(o.tx.bytes, bytes(10_000_000, 64_000));
        assert_eq!(o.tx.packets, bytes(500, 64));
        assert_eq!(o.rx.bytes, bytes(1_000_000_000, 50_000_000));
        assert_eq!((o.share.as_deref(), &o.plug), (Some("up"), &Plug::Switch("lan".into())));
        let o = o.and("tx=none,share=none,guard=off,loss=0.5%,delay=5ms,jitter=200us").unwrap();
        assert_eq!((o.tx.bytes, o.share, o.guard), (None, None, GuardBy::Nothing));
        assert_eq!((o.faults.lose, o.faults.delay), (5000, Duration::from_millis(5)));
        assert_eq!(o.faults.jitter, Duration::from_micros(200));
        let files = Plug::Files { record: Some("/a".into()), replay: Some("/b".into()) };
        assert_eq!(said("record=/a,replay=/b").plug, files);
        assert_eq!(said("loopback").plug, Plug::Loopback);
        assert_eq!(said("afxdp=eth1").plug, Plug::AfXdp("eth1".into()));
        assert_eq!(said("tap=t0").plug, Plug::Opened("t0".into()));
    }

    #[test]
    fn anything_else_is_refused_by_its_name() {
        for bad in [
            "x",
            "guard",
            "guard=yes",
            "tx=0",
            "tx=",
            "tx=-1",
            "tx=1T",
            "tx=1/0",
            "loss=101",
            "loss=nan",
            "delay=5",
            "delay=61s",
            "switch=",
            "afxdp",
            "switch=a/b",
            "record=a",
            "loopback=1",
            "seed=x",
            "tx=99999999999999999999",
            "tx=99999999999G",
            "share=.",
        ] {
            let words = std::format!("guard=mac,{bad},loss=1");
            let error = NicOptions::default().and(&words).unwrap_err();
            assert!(error.to_string().contains(bad), "{bad}: {error}");
        }
    }
}
