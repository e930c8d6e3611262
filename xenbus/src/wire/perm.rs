use core::fmt;

use pvio_ring::DomId;

use super::parse_u16;

/// Maximum length of a permission as text, in bytes: a letter and five digits.
pub const PERM_TEXT_MAX: usize = 6;

/// Access that a permission entry grants.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Access {
    /// `n`: nothing.
    None,
    /// `r`: read.
    Read,
    /// `w`: write.
    Write,
    /// `b`: read and write.
    Both,
}

impl Access {
    /// Returns whether reading is allowed.
    #[must_use]
    pub const fn can_read(self) -> bool {
        matches!(self, Self::Read | Self::Both)
    }

    /// Returns whether writing is allowed.
    #[must_use]
    pub const fn can_write(self) -> bool {
        matches!(self, Self::Write | Self::Both)
    }
}

/// One entry of a node's permissions, `<letter><domid>` on the wire.
///
/// The first entry of a node names its **owner**, which has full access, and the access of domains
/// that are not listed after it; each later entry is for the domain that it names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Perm {
    /// The domain of the entry.
    pub domid: DomId,
    /// The access.
    pub access: Access,
}

/// The text is not a letter of `nrwb` followed by a number of 0 to 65535.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not a permission: expected one of n, r, w, b and a domain number")]
pub struct PermError;

impl Perm {
    /// Creates an entry.
    #[must_use]
    pub const fn new(domid: DomId, access: Access) -> Self {
        Self { domid, access }
    }

    /// Parses an entry.
    ///
    /// # Errors
    /// [`PermError`] for any other form.
    pub fn parse(text: &[u8]) -> Result<Self, PermError> {
        let (letter, number) = text.split_first().ok_or(PermError)?;
        let access = match letter {
            b'n' => Access::None,
            b'r' => Access::Read,
            b'w' => Access::Write,
            b'b' => Access::Both,
            _ => return Err(PermError),
        };
        let domid = parse_u16(number).map(DomId).ok_or(PermError)?;
        Ok(Self { domid, access })
    }
}

impl fmt::Display for Perm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = match self.access {
            Access::None => 'n',
            Access::Read => 'r',
            Access::Write => 'w',
            Access::Both => 'b',
        };
        write!(f, "{letter}{}", self.domid)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::string::ToString;

    #[test]
    fn malformed_permission_entry_is_rejected() {
        for bad in ["", "r", "x1", "r-1", "r65536", "rr1", "r1 ", "1r"] {
            assert_eq!(Perm::parse(bad.as_bytes()), Err(PermError), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn permission_entry_text_round_trips(domid: u16, which in 0..4) {
            let access = [Access::None, Access::Read, Access::Write, Access::Both][which as usize];
            let p = Perm::new(DomId(domid), access);
            let text = p.to_string();
            prop_assert!(text.len() <= PERM_TEXT_MAX);
            prop_assert_eq!(Perm::parse(text.as_bytes()), Ok(p));
        }
    }
}
