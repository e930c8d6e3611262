//! File names as text. A file name is a byte string without an encoding, and the text preserves
//! every byte.

use core::fmt::{self, Write};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// A file name in a message: UTF-8 unchanged, but a backslash as `\\`, and every byte of a control
/// character or of invalid UTF-8 as `\x` and two digits. `printf %b` converts it back to the bytes.
#[derive(Clone, Copy, Debug)]
pub struct EscapedPath<'a>(&'a [u8]);

impl<'a> EscapedPath<'a> {
    /// Creates the text of a file name.
    pub fn new(name: &'a (impl AsRef<OsStr> + ?Sized)) -> Self {
        Self(name.as_ref().as_bytes())
    }
}

impl fmt::Display for EscapedPath<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for c in chunk.valid().chars() {
                match c {
                    '\\' => f.write_str("\\\\")?,
                    c if c.is_control() => {
                        let mut bytes = [0; 4];
                        c.encode_utf8(&mut bytes)
                            .bytes()
                            .try_for_each(|b| write!(f, "\\x{b:02x}"))?;
                    }
                    c => f.write_char(c)?,
                }
            }
            chunk.invalid().iter().try_for_each(|byte| write!(f, "\\x{byte:02x}"))?;
        }
        Ok(())
    }
}

/// Writes text unchanged if it is UTF-8, otherwise as [`EscapedPath`].
pub(super) fn utf8_or_escaped(text: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    match core::str::from_utf8(text) {
        Ok(text) => f.write_str(text),
        Err(_) => fmt::Display::fmt(&EscapedPath(text), f),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use alloc::vec::Vec;

    #[test]
    fn displayed_names_are_unique_and_escape_control_bytes() {
        let shown = |bytes: &[u8]| EscapedPath(bytes).to_string();
        assert_eq!(shown("/srv/gäst 1.img".as_bytes()), "/srv/gäst 1.img");
        assert_eq!(shown(b"/srv/\xff\\\n.img"), "/srv/\\xff\\\\\\x0a.img");
        assert_eq!(shown("\u{85}".as_bytes()), "\\xc2\\x85");
        let names: [&[u8]; 5] = [b"\xff", b"\\xff", b"\\\\xff", "\u{fffd}".as_bytes(), b"\xfe"];
        let mut all: Vec<_> = names.iter().map(|name| shown(name)).collect();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), names.len());
    }
}
