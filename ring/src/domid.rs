use core::fmt;

/// Identifies a domain (`domid_t` in Xen's `xen.h`): 16 bits, of which the hypervisor hands out
/// 0 to [`DomId::FIRST_RESERVED`] − 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct DomId(pub u16);

impl DomId {
    /// Domain 0, the control domain (`DOMID_0`).
    pub const DOM0: Self = Self(0);
    /// The first number with a special meaning (`DOMID_FIRST_RESERVED`); no domain has it.
    pub const FIRST_RESERVED: u16 = 0x7ff0;
    /// A caller's own domain (`DOMID_SELF`).
    pub const SELF: Self = Self(0x7ff0);

    /// Whether a real domain can have this number.
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
