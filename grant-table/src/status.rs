/// Status of one grant operation (`GNTST_*`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, thiserror::Error)]
#[repr(i16)]
pub enum GrantStatus {
    /// Success.
    #[error("done")]
    Okay = 0,
    /// An unspecified error.
    #[error("general error")]
    GeneralError = -1,
    /// The domain does not exist.
    #[error("no such domain")]
    BadDomain = -2,
    /// The reference is not a grant to this domain.
    #[error("not a grant to this domain")]
    BadGrantRef = -3,
    /// The handle names no mapping.
    #[error("no such mapping")]
    BadHandle = -4,
    /// The virtual address cannot be used for a mapping.
    #[error("bad virtual address")]
    BadVirtualAddress = -5,
    /// The device address cannot be used for a mapping.
    #[error("bad device address")]
    BadDeviceAddress = -6,
    /// The IOMMU has no space.
    #[error("no IOMMU space")]
    NoDeviceSpace = -7,
    /// Insufficient privileges.
    #[error("permission denied")]
    PermissionDenied = -8,
    /// The page is not ordinary memory of the granting domain.
    #[error("bad page")]
    BadPage = -9,
    /// The copy would cross a page boundary.
    #[error("copy crosses a page")]
    BadCopyArgument = -10,
    /// The address is too large.
    #[error("address too big")]
    AddressTooBig = -11,
    /// The page is temporarily unavailable (paged out, or shared): try again.
    #[error("page not available yet")]
    Again = -12,
    /// The mapping table is full.
    #[error("no space for more mappings")]
    NoSpace = -13,
}

impl GrantStatus {
    /// Converts a value from the wire; anything undefined is a general error.
    #[must_use]
    pub const fn from_wire(status: i16) -> Self {
        match status {
            0 => Self::Okay,
            -2 => Self::BadDomain,
            -3 => Self::BadGrantRef,
            -4 => Self::BadHandle,
            -5 => Self::BadVirtualAddress,
            -6 => Self::BadDeviceAddress,
            -7 => Self::NoDeviceSpace,
            -8 => Self::PermissionDenied,
            -9 => Self::BadPage,
            -10 => Self::BadCopyArgument,
            -11 => Self::AddressTooBig,
            -12 => Self::Again,
            -13 => Self::NoSpace,
            _ => Self::GeneralError,
        }
    }

    /// Returns whether a mapping failed for lack of resources (address space, IOMMU space, table
    /// entries), which is not the granting domain's fault: the data can still be copied.
    #[must_use]
    pub const fn is_exhaustion(self) -> bool {
        matches!(self, Self::NoDeviceSpace | Self::NoSpace)
    }

    /// Returns a short stable code for logs, counters and `error` nodes.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Okay => "okay",
            Self::GeneralError => "grant-general-error",
            Self::BadDomain => "grant-bad-domain",
            Self::BadGrantRef => "grant-bad-reference",
            Self::BadHandle => "grant-bad-handle",
            Self::BadVirtualAddress => "grant-bad-virtual-address",
            Self::BadDeviceAddress => "grant-bad-device-address",
            Self::NoDeviceSpace => "grant-no-device-space",
            Self::PermissionDenied => "grant-permission-denied",
            Self::BadPage => "grant-bad-page",
            Self::BadCopyArgument => "grant-bad-copy-argument",
            Self::AddressTooBig => "grant-address-too-big",
            Self::Again => "grant-try-again",
            Self::NoSpace => "grant-no-space",
        }
    }
}
