use core::fmt;

/// Identifies a domain (`domid_t` in Xen's `xen.h`): 16 bits; the hypervisor assigns 0 to
/// [`DomId::FIRST_RESERVED`] − 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[repr(transparent)]
pub struct DomId(pub u16);

impl DomId {
    /// Domain 0, the control domain (`DOMID_0`).
    pub const DOM0: Self = Self(0);
    /// The first reserved number (`DOMID_FIRST_RESERVED`); no domain has it or a higher one.
    pub const FIRST_RESERVED: u16 = 0x7ff0;
    /// The calling domain (`DOMID_SELF`).
    pub const SELF: Self = Self(0x7ff0);

    /// Returns whether the number can be that of a domain.
    #[must_use]
    pub const fn is_real(self) -> bool {
        self.0 < Self::FIRST_RESERVED
    }
}

impl fmt::Display for DomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
