//! Names of a guest's disks, and the numbers they stand for (`docs/man/xen-vbd-interface.7`).

use std::fmt;
use std::str::FromStr;

/// A disk of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Vdev(u32);

/// Numbers of disks and of partitions from which on the extended encoding is used.
const SHORT_DISKS: u32 = 16;
const SHORT_PARTITIONS: u32 = 16;
/// Flag of the extended encoding, which has 20 bits for the disk and 8 for the partition.
const EXTENDED: u32 = 1 << 28;
const MAX_DISKS: u32 = 1 << 20;
const MAX_PARTITIONS: u32 = 256;

impl Vdev {
    /// Returns the whole disk of that index: 0 is `xvda`.
    #[must_use]
    pub const fn disk(n: u32) -> Self {
        Self(if n < SHORT_DISKS { 202 << 8 | n << 4 } else { EXTENDED | n << 8 })
    }

    /// Returns the device of a number in xenstore.
    #[must_use]
    pub const fn from_number(number: u32) -> Self {
        Self(number)
    }

    /// Returns the device's number in xenstore.
    #[must_use]
    pub const fn number(self) -> u32 {
        self.0
    }
}

impl FromStr for Vdev {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("invalid disk of a guest {text:?}: expected xvdb, or its number");
        if let Ok(number) = text.parse() {
            return Ok(Self(number));
        }
        let rest = text.strip_prefix("xvd").ok_or_else(wrong)?;
        let digits = rest.trim_start_matches(|c: char| c.is_ascii_lowercase());
        let letters = &rest[..rest.len() - digits.len()];
        if letters.is_empty() || letters.len() > 4 || digits.starts_with('0') {
            return Err(wrong());
        }
        // a to z, then aa to az: bijective base 26.
        let disk = letters.bytes().fold(0, |n, c| n * 26 + u32::from(c - b'a') + 1) - 1;
        let part: u32 = if digits.is_empty() { 0 } else { digits.parse().map_err(|_| wrong())? };
        if disk >= MAX_DISKS || part >= MAX_PARTITIONS {
            return Err(wrong());
        }
        Ok(if disk < SHORT_DISKS && part < SHORT_PARTITIONS {
            Self(Self::disk(disk).0 | part)
        } else {
            Self(EXTENDED | disk << 8 | part)
        })
    }
}

impl fmt::Display for Vdev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (disk, part) = match self.0 {
            n if n & EXTENDED != 0 && n < EXTENDED << 1 => (n >> 8 & (MAX_DISKS - 1), n & 255),
            n if n >> 8 == 202 => (n >> 4 & 15, n & 15),
            n => return write!(f, "{n}"),
        };
        let mut letters = Vec::new();
        let mut left = disk + 1;
        while left > 0 {
            letters.push(char::from(b'a' + ((left - 1) % 26) as u8));
            left = (left - 1) / 26;
        }
        let letters: String = letters.iter().rev().collect();
        write!(f, "xvd{letters}")?;
        if part > 0 { write!(f, "{part}") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vdev_names_convert_to_numbers_and_invalid_names_are_rejected() {
        for (name, number) in [
            ("xvda", 51712),
            ("xvdb", 51728),
            ("xvda1", 51713),
            ("xvdp15", 51967),
            ("xvdq", 268_439_552),
            ("xvda16", 268_435_472),
            ("xvdaa", EXTENDED | 26 << 8),
            ("768", 768),
        ] {
            let vdev: Vdev = name.parse().unwrap();
            assert_eq!((vdev.number(), vdev.to_string().as_str()), (number, name));
        }
        assert_eq!(
            (Vdev::disk(1), Vdev::disk(16)),
            ("xvdb".parse().unwrap(), "xvdq".parse().unwrap())
        );
        for bad in ["", "xvd", "xvda0", "xvdA", "sda", "xvdabcde", "xvda256", "xvda1x", "xvd1"] {
            assert!(bad.parse::<Vdev>().is_err(), "{bad}");
        }
    }
}
