//! Expected contents of a cell, and a diagnosis of unexpected ones.

use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64Mcg;

/// Bytes of a cell.
pub(super) const CELL: usize = 4096;

/// Fills `out` with the contents of a cell after it was written `version` times. The first bytes
/// identify cell and version.
pub(super) fn contents(seed: u64, cell: u64, version: u32, out: &mut [u8]) {
    let key = seed ^ cell.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(version) << 40;
    Pcg64Mcg::seed_from_u64(key).fill_bytes(out);
    out[..8].copy_from_slice(&cell.to_le_bytes());
    out[8..12].copy_from_slice(&version.to_le_bytes());
}

/// Describes the unexpected contents of a cell: another cell, another version, or something else.
pub(super) fn diagnose(seed: u64, cell: u64, version: u32, got: &[u8]) -> String {
    if got.iter().all(|b| *b == 0) {
        return "all zeroes".into();
    }
    if got.iter().all(|b| *b == 0xa5) {
        return "no data was read".into();
    }
    let mut number = [0; 8];
    number.copy_from_slice(&got[..8]);
    let found = u64::from_le_bytes(number);
    let times = u32::from_le_bytes([got[8], got[9], got[10], got[11]]);
    let mut candidate = vec![0; CELL];
    contents(seed, found, times, &mut candidate);
    if candidate == got {
        match found == cell {
            true if times < version => format!("as it was after {times} writes: a write was lost"),
            true => format!("as it will be after {times} writes"),
            false => format!("what belongs at byte {}", found.wrapping_mul(CELL as u64)),
        }
    } else {
        "torn, or nothing ever written".into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cell_contents_differ_by_seed_cell_and_version() {
        let of = |seed, cell, version| {
            let mut out = vec![0; CELL];
            contents(seed, cell, version, &mut out);
            out
        };
        assert_eq!(of(1, 2, 3), of(1, 2, 3));
        for other in [of(2, 2, 3), of(1, 3, 3), of(1, 2, 4)] {
            let equal = of(1, 2, 3).iter().zip(&other).filter(|(a, b)| a == b).count();
            assert!(equal < 100, "{equal} bytes are equal");
        }
    }

    #[test]
    fn cell_mismatch_is_explained() {
        let mut cell = vec![0; CELL];
        contents(1, 7, 2, &mut cell);
        assert!(diagnose(1, 7, 3, &cell).contains("a write was lost"));
        assert!(diagnose(1, 8, 3, &cell).contains("belongs at byte 28672"));
        cell[4000] ^= 1;
        assert!(diagnose(1, 7, 3, &cell).contains("torn"));
        assert_eq!(diagnose(1, 7, 3, &[0; CELL]), "all zeroes");
    }
}
