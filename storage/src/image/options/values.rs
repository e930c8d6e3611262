//! Values of options: numbers, sizes, times, rates.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;
use pvio_runtime::BucketRate;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Parses a path in which bytes may be written as `%2C`; commas and brackets must be.
pub(super) fn path(text: &[u8]) -> Option<PathBuf> {
    let path = unescape(text).filter(|path| !path.is_empty())?;
    Some(OsString::from_vec(path).into())
}

/// Formats a path for [`path`], always in UTF-8.
pub(super) fn escaped(path: &Path) -> String {
    let special =
        |c: char| matches!(c, '%' | ',' | '[' | ']') || c.is_whitespace() || c.is_control();
    let mut text = String::new();
    for chunk in path.as_os_str().as_bytes().utf8_chunks() {
        for c in chunk.valid().chars() {
            match special(c) {
                true => {
                    c.encode_utf8(&mut [0; 4]).bytes().for_each(|b| text += &format!("%{b:02X}"))
                }
                false => text.push(c),
            }
        }
        chunk.invalid().iter().for_each(|b| text += &format!("%{b:02X}"));
    }
    text
}

/// Decodes `%2F` and the like.
pub(in crate::image) fn unescape(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.iter().copied();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let digit = |b: Option<u8>| char::from(b?).to_digit(16);
        let (high, low) = (digit(bytes.next())?, digit(bytes.next())?);
        out.push(u8::try_from(high * 16 + low).ok()?);
    }
    Some(out)
}

pub(super) fn switch(word: &str) -> Option<bool> {
    match word {
        "on" => Some(true),
        "off" => Some(false),
        _ => None,
    }
}

pub(super) fn is_sector(bytes: &u32) -> bool {
    matches!(bytes, 512 | 4096)
}

pub(super) fn is_power(bytes: &u32) -> bool {
    bytes.is_power_of_two()
}

pub(super) fn number(text: &str, least: u32, most: u32) -> Option<u32> {
    text.parse().ok().filter(|n| (least..=most).contains(n))
}

pub(super) fn plain(text: &str) -> Option<u64> {
    text.parse().ok()
}

/// Parses a size such as `64M`, in bytes.
pub(in crate::image) fn size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text.get(digits.len()..)? {
        "" | "B" => 0,
        "k" | "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        "T" | "TiB" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift))
}

/// Parses `N`, `N/BURST` or `none`. The default burst is a tenth of the rate per second.
pub(super) fn rate(text: &str, number: impl Fn(&str) -> Option<u64>) -> Option<Option<BucketRate>> {
    if text == "none" {
        return Some(None);
    }
    let (per_second, burst) = match text.split_once('/') {
        Some((rate, burst)) => (number(rate)?, number(burst)?),
        None => number(text).map(|rate| (rate, (rate / 10).max(1)))?,
    };
    (per_second > 0 && burst > 0).then_some(Some(BucketRate::per_second(per_second, burst)))
}

/// Formats a time in the largest unit that represents it exactly.
pub(super) fn time_in_words(time: Duration) -> String {
    let nanos = time.as_nanos();
    let units = [(1_000_000_000, "s"), (1_000_000, "ms"), (1_000, "us"), (1, "ns")];
    let fits = units.into_iter().find(|(unit, _)| nanos > 0 && nanos.is_multiple_of(*unit));
    fits.map_or("0".into(), |(unit, word)| format!("{}{word}", nanos / unit))
}

/// Parses a time such as `5ms`, at most an hour.
pub(super) fn time(text: &str) -> Option<Duration> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let nanos: u64 = match text.get(digits.len()..)? {
        "ns" => 1,
        "us" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "" if digits == "0" => 0,
        _ => return None,
    };
    let time = Duration::from_nanos(digits.parse::<u64>().ok()?.checked_mul(nanos)?);
    (time <= Duration::from_secs(3600)).then_some(time)
}
