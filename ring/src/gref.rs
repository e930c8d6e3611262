use core::fmt;

/// A grant reference (`grant_ref_t`): an index into the granting domain's grant table. It is
/// meaningful only together with that domain.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[repr(transparent)]
pub struct GrantRef(pub u32);

impl GrantRef {
    /// References below this number are reserved for the toolstack (`GNTTAB_NR_RESERVED_ENTRIES`:
    /// 0 is the console ring, 1 the xenstore ring).
    pub const FIRST_FREE: Self = Self(8);
}

impl fmt::Display for GrantRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
