//! Policies for access to guest pages, and the data path of a session.

use core::fmt;
use core::str::FromStr;

/// The way a queue accesses its guest's pages.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum DataPath {
    /// Every page is mapped for the duration of its request. No data is copied; each request costs
    /// a map and an unmap. The kernel transfers data between the disk and the guest's page.
    Map,
    /// Data passes through bounce buffers. Each request costs a copy by the hypervisor, and no
    /// guest page except the rings is ever mapped.
    Copy,
    /// Pages stay mapped and are found again by their grant reference. No data is copied and, once
    /// the guest has used all its buffers, nothing is mapped any more. Requires a frontend with
    /// persistent grants (`feature-persistent`). Pages beyond the [limit of cached
    /// mappings](crate::pages::cached_max) are mapped for the duration of their request.
    PersistentOrMap,
    /// Like `PersistentOrMap`, but data of pages beyond the limit passes through bounce buffers.
    PersistentOrCopy,
}

impl DataPath {
    /// All paths.
    pub const ALL: [Self; 4] =
        [Self::Map, Self::Copy, Self::PersistentOrMap, Self::PersistentOrCopy];

    /// Returns whether mappings are cached.
    #[must_use]
    pub const fn caches(self) -> bool {
        matches!(self, Self::PersistentOrMap | Self::PersistentOrCopy)
    }

    /// Returns whether data of pages without a cached mapping is copied; otherwise such pages are
    /// mapped.
    #[must_use]
    pub const fn copies(self) -> bool {
        matches!(self, Self::Copy | Self::PersistentOrCopy)
    }

    /// Returns the name used in logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Map => "map",
            Self::Copy => "copy",
            Self::PersistentOrMap => "persistent-or-map",
            Self::PersistentOrCopy => "persistent-or-copy",
        }
    }
}

impl fmt::Display for DataPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The data path policy of a disk; it names both paths where the choice depends on the frontend.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Policy {
    /// [`DataPath::Map`], whatever the frontend requests.
    #[default]
    Map,
    /// [`DataPath::Copy`], whatever the frontend requests.
    Copy,
    /// Persistent grants are advertised. Pages without a cached mapping are mapped, and so are all
    /// pages of a frontend without persistent grants.
    PersistentOrMap,
    /// Persistent grants are advertised. Data of pages without a cached mapping is copied, and so
    /// is all data of a frontend without persistent grants.
    PersistentOrCopy,
}

impl Policy {
    /// All policies.
    pub const ALL: [Self; 4] =
        [Self::Map, Self::Copy, Self::PersistentOrMap, Self::PersistentOrCopy];

    /// Returns whether `feature-persistent` is advertised.
    #[must_use]
    pub const fn offers_persistent(self) -> bool {
        matches!(self, Self::PersistentOrMap | Self::PersistentOrCopy)
    }

    /// Returns the data path, depending on whether persistent grants were negotiated.
    #[must_use]
    pub const fn path(self, agreed: bool) -> DataPath {
        match self {
            Self::PersistentOrMap if agreed => DataPath::PersistentOrMap,
            Self::PersistentOrCopy if agreed => DataPath::PersistentOrCopy,
            Self::Map | Self::PersistentOrMap => DataPath::Map,
            Self::Copy | Self::PersistentOrCopy => DataPath::Copy,
        }
    }

    /// Returns the name used on the command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Map => "map",
            Self::Copy => "copy",
            Self::PersistentOrMap => "persistent-or-map",
            Self::PersistentOrCopy => "persistent-or-copy",
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The name is not that of a policy.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not one of: map, copy, persistent-or-map, persistent-or-copy")]
pub struct UnknownPolicy;

impl FromStr for Policy {
    type Err = UnknownPolicy;

    fn from_str(word: &str) -> Result<Self, UnknownPolicy> {
        Self::ALL.into_iter().find(|policy| policy.as_str() == word).ok_or(UnknownPolicy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn persistent_grants_are_used_only_if_advertised_and_negotiated() {
        for policy in Policy::ALL {
            assert_eq!(policy.as_str().parse(), Ok(policy));
            let [agreed, not] = [true, false].map(|agreed| policy.path(agreed));
            assert_eq!((agreed.caches(), not.caches()), (policy.offers_persistent(), false));
            assert_eq!(agreed.copies(), not.copies(), "{policy}");
            assert_eq!(agreed.as_str(), policy.as_str());
        }
        assert_eq!("persistent".parse::<Policy>(), Err(UnknownPolicy));
    }
}
