/// Splits the first NUL-terminated string off `payload`: returns the string without its NUL, and
/// the rest. `None` if there is no NUL.
#[must_use]
pub fn split_string(payload: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut halves = payload.splitn(2, |&b| b == 0);
    let first = halves.next()?;
    let rest = halves.next()?;
    Some((first, rest))
}

/// Returns the NUL-terminated strings of `payload`, without their NULs. Bytes after the last NUL
/// are not a string and are ignored, as in the reference server.
pub fn strings(payload: &[u8]) -> impl Iterator<Item = &[u8]> + Clone {
    let mut rest = payload;
    core::iter::from_fn(move || {
        let (first, tail) = split_string(rest)?;
        rest = tail;
        Some(first)
    })
}

/// Parses a decimal number: digits only, no sign, no spaces. `None` for anything else or beyond 2⁶⁴
/// − 1.
#[must_use]
pub fn parse_u64(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0_u64, |n, &b| {
        if !b.is_ascii_digit() {
            return None;
        }
        n.checked_mul(10)?.checked_add(u64::from(b.wrapping_sub(b'0')))
    })
}

/// Parses as [`parse_u64`], limited to 2³² − 1.
#[must_use]
pub fn parse_u32(text: &[u8]) -> Option<u32> {
    parse_u64(text).and_then(|n| n.try_into().ok())
}

/// Parses as [`parse_u64`], limited to 2¹⁶ − 1.
#[must_use]
pub fn parse_u16(text: &[u8]) -> Option<u16> {
    parse_u64(text).and_then(|n| n.try_into().ok())
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::{string::ToString, vec, vec::Vec};

    #[test]
    fn strings_drop_unterminated_tail() {
        assert_eq!(strings(b"a\0\0bc\0tail").collect::<Vec<_>>(), vec![&b"a"[..], b"", b"bc"]);
        assert_eq!(strings(b"").count(), 0);
        assert_eq!(split_string(b"path\0va\0lue"), Some((&b"path"[..], &b"va\0lue"[..])));
        assert_eq!(split_string(b"path"), None);
    }

    #[test]
    fn malformed_number_is_rejected() {
        for bad in ["", "-1", "+1", " 1", "1 ", "0x1", "18446744073709551616", "9e1"] {
            assert_eq!(parse_u64(bad.as_bytes()), None, "{bad}");
        }
        assert_eq!(parse_u16(b"65536"), None);
        assert_eq!(parse_u32(b"4294967296"), None);
        assert_eq!(parse_u32(b"007"), Some(7));
    }

    proptest! {
        #[test]
        fn number_text_round_trips(n: u64) {
            prop_assert_eq!(parse_u64(n.to_string().as_bytes()), Some(n));
        }
    }
}
