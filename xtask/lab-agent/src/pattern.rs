//! Reproducible test data: every 8 bytes are derived from a seed and their offset.

/// Returns the word at a byte offset that is a multiple of 8 (splitmix64).
fn word(seed: u64, offset: u64) -> u64 {
    let mut z = (seed ^ (offset >> 3)).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^ (z >> 27)
}

/// Fills `bytes` with the data at `offset`, a multiple of 8.
pub fn fill(bytes: &mut [u8], seed: u64, offset: u64) {
    let mut at = offset;
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&word(seed, at).to_le_bytes()[..chunk.len()]);
        at += 8;
    }
}

/// Returns the index of the first byte that differs from the data of [`fill`].
pub fn mismatch(bytes: &[u8], seed: u64, offset: u64) -> Option<usize> {
    let mut at = offset;
    for (i, chunk) in bytes.chunks(8).enumerate() {
        let expected = word(seed, at).to_le_bytes();
        if let Some(j) = chunk.iter().zip(expected).position(|(a, b)| *a != b) {
            return Some(i * 8 + j);
        }
        at += 8;
    }
    None
}

/// A checksum of bytes in order, 8 at a time: not cryptographic, but fast under emulation.
#[derive(Clone, Copy)]
pub struct Sum(u64);

impl Sum {
    /// The checksum of no bytes.
    pub const NEW: Self = Self(0xcbf2_9ce4_8422_2325);

    /// Adds bytes; the length must be a multiple of 8 in all calls except the last.
    pub fn add(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            let mixed = (self.0 ^ u64::from_le_bytes(word)).wrapping_mul(0x0100_0000_01b3);
            self.0 = mixed ^ (mixed >> 29) ^ chunk.len() as u64;
        }
    }

    /// Returns the checksum as 16 digits.
    pub fn text(self) -> String {
        format!("{:016x}", self.0)
    }
}

/// Reproducible pseudorandom numbers (xorshift64).
pub struct Random(u64);

impl Random {
    /// Returns a generator with this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Returns a number below a bound, which must not be 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pattern_mismatch_is_found_at_changed_byte() {
        let mut bytes = vec![0; 1003];
        fill(&mut bytes, 7, 512);
        assert_eq!(mismatch(&bytes, 7, 512), None);
        assert_eq!(mismatch(&bytes[8..], 7, 520), None);
        bytes[1001] ^= 1;
        assert_eq!(mismatch(&bytes, 7, 512), Some(1001));
        assert!(mismatch(&bytes, 8, 512).is_some());
    }

    #[test]
    fn sum_depends_on_every_byte_and_order() {
        let sum = |bytes: &[u8]| {
            let mut sum = Sum::NEW;
            sum.add(bytes);
            sum.text()
        };
        assert_ne!(sum(b"12345678abcdefgh"), sum(b"abcdefgh12345678"));
        assert_ne!(sum(b"1234567"), sum(b"12345670"));
        assert_ne!(sum(b""), sum(b"\0"));
    }
}
