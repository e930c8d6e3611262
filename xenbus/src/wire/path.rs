/// Maximum length of an absolute path, in bytes (`XENSTORE_ABS_PATH_MAX`).
pub const ABS_PATH_MAX: usize = 3072;
/// Maximum length of a relative path, in bytes (`XENSTORE_REL_PATH_MAX`).
pub const REL_PATH_MAX: usize = 2048;

/// A path that a client sent, validated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WirePath<'a> {
    /// Starts with `/`; is exactly `/` or does not end in one.
    Absolute(&'a str),
    /// Relative to the caller's home directory, `/local/domain/<domid>`.
    Relative(&'a str),
    /// `@introduceDomain`, `@releaseDomain`, optionally with `/<domid>`: can only be watched, or be
    /// given permissions. Other names after the `@` are valid and never cause an event.
    Special(&'a str),
}

/// Why a path is rejected.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PathError {
    /// The empty path.
    #[error("the path is empty")]
    Empty,
    /// Longer than [`ABS_PATH_MAX`] or [`REL_PATH_MAX`].
    #[error("the path is longer than {0} bytes")]
    TooLong(usize),
    /// A byte outside `A-Z a-z 0-9 - / _ @`.
    #[error("the path holds the byte {0:#04x}")]
    BadByte(u8),
    /// The path contains `//`.
    #[error("the path has an empty component")]
    DoubleSlash,
    /// A `/` at the end of a path other than `/`.
    #[error("the path ends in a slash")]
    TrailingSlash,
}

impl<'a> WirePath<'a> {
    /// Validates a path: its length, its characters and its slashes (`docs/misc/xenstore.txt`,
    /// introduction).
    ///
    /// # Errors
    /// The first rule of [`PathError`] that it violates.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, PathError> {
        let first = *bytes.first().ok_or(PathError::Empty)?;
        let limit = if first == b'/' { ABS_PATH_MAX } else { REL_PATH_MAX };
        if bytes.len() > limit {
            return Err(PathError::TooLong(limit));
        }
        if let Some(&bad) = bytes.iter().find(|&&b| !is_path_byte(b)) {
            return Err(PathError::BadByte(bad));
        }
        if bytes.windows(2).any(|pair| pair == b"//") {
            return Err(PathError::DoubleSlash);
        }
        if bytes.len() > 1 && bytes.last() == Some(&b'/') {
            return Err(PathError::TrailingSlash);
        }
        // Only ASCII passes the checks above.
        let text = core::str::from_utf8(bytes).map_err(|_| PathError::BadByte(first))?;
        Ok(match first {
            b'/' => Self::Absolute(text),
            b'@' => Self::Special(text),
            _ => Self::Relative(text),
        })
    }

    /// Returns the path as the client sent it.
    #[must_use]
    pub const fn as_str(&self) -> &'a str {
        match *self {
            Self::Absolute(s) | Self::Relative(s) | Self::Special(s) => s,
        }
    }
}

/// Returns the parent of an absolute path: `/` for `/a`, `None` for `/` and for other paths.
#[must_use]
pub fn parent(path: &str) -> Option<&str> {
    if path == "/" || !path.starts_with('/') {
        return None;
    }
    match path.rfind('/') {
        Some(0) => Some("/"),
        Some(at) => path.get(..at),
        None => None,
    }
}

const fn is_path_byte(b: u8) -> bool {
    b.is_ascii_alphanumeric() || matches!(b, b'-' | b'/' | b'_' | b'@')
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::{format, string::String, vec};

    #[test]
    fn path_with_invalid_form_is_rejected() {
        assert_eq!(WirePath::parse(b"/"), Ok(WirePath::Absolute("/")));
        assert_eq!(WirePath::parse(b"/a/b-c_D@9"), Ok(WirePath::Absolute("/a/b-c_D@9")));
        assert_eq!(WirePath::parse(b"device/vbd"), Ok(WirePath::Relative("device/vbd")));
        assert_eq!(WirePath::parse(b"@releaseDomain/7"), Ok(WirePath::Special("@releaseDomain/7")));
        assert_eq!(WirePath::parse(b""), Err(PathError::Empty));
        assert_eq!(WirePath::parse(b"//"), Err(PathError::DoubleSlash));
        assert_eq!(WirePath::parse(b"/a//b"), Err(PathError::DoubleSlash));
        assert_eq!(WirePath::parse(b"/a/"), Err(PathError::TrailingSlash));
        assert_eq!(WirePath::parse(b"/a b"), Err(PathError::BadByte(b' ')));
        assert_eq!(WirePath::parse(b"/a.b"), Err(PathError::BadByte(b'.')));
        assert_eq!(WirePath::parse("/ä".as_bytes()), Err(PathError::BadByte(0xc3)));
    }

    #[test]
    fn path_over_maximum_length_is_rejected() {
        let abs = |n: usize| format!("/{}", "a".repeat(n - 1));
        assert!(WirePath::parse(abs(3072).as_bytes()).is_ok());
        assert_eq!(WirePath::parse(abs(3073).as_bytes()), Err(PathError::TooLong(3072)));
        assert!(WirePath::parse(&vec![b'a'; 2048]).is_ok());
        assert_eq!(WirePath::parse(&vec![b'a'; 2049]), Err(PathError::TooLong(2048)));
    }

    #[test]
    fn parent_of_root_is_none() {
        assert_eq!(parent("/a/b"), Some("/a"));
        assert_eq!(parent("/a"), Some("/"));
        assert_eq!(parent("/"), None);
        assert_eq!(parent("a/b"), None);
        assert_eq!(parent("@releaseDomain"), None);
    }

    proptest! {
        #[test]
        fn parse_of_random_bytes_yields_only_well_formed_paths(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(p) = WirePath::parse(&bytes) {
                let s: String = p.as_str().into();
                prop_assert_eq!(s.as_bytes(), &bytes[..]);
                prop_assert!(!s.contains("//") && (s == "/" || !s.ends_with('/')));
            }
        }
    }
}
