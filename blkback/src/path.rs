//! The ways to a guest's pages, and which of them a disk is to take.

use core::fmt;
use core::str::FromStr;

/// How a queue reaches its guest's pages.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DataPath {
    /// Every page is mapped for the length of its request: no byte is copied, and each request
    /// costs a map and an unmap. The kernel moves data between the disk and the guest's page.
    Map,
    /// Data goes through pages of our own: each request costs a copy by the hypervisor, and nothing
    /// of the guest's is ever mapped but its rings.
    Copy,
    /// Pages stay mapped and are found again by their grant reference: no byte is copied and,
    /// once the guest has used all its buffers, nothing is mapped. Needs a frontend that keeps its
    /// grants (`feature-persistent`). Pages beyond [those that are
    /// kept](crate::pages::kept_most) are mapped for the length of their request.
    PersistentOrMap,
    /// The same, but data of pages beyond those that are kept goes through pages of our own.
    PersistentOrCopy,
}

impl DataPath {
    /// Every path.
    pub const ALL: [Self; 4] =
        [Self::Map, Self::Copy, Self::PersistentOrMap, Self::PersistentOrCopy];

    /// Whether pages stay mapped.
    #[must_use]
    pub const fn keeps(self) -> bool {
        matches!(self, Self::PersistentOrMap | Self::PersistentOrCopy)
    }

    /// Whether data of pages that do not stay mapped is copied; else such pages are mapped.
    #[must_use]
    pub const fn copies(self) -> bool {
        matches!(self, Self::Copy | Self::PersistentOrCopy)
    }

    /// A word for logs.
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

/// Which path a disk takes; where it depends on the frontend, both.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Policy {
    /// [`DataPath::Map`], whatever the frontend asks for.
    #[default]
    Map,
    /// [`DataPath::Copy`], whatever the frontend asks for.
    Copy,
    /// Keeping pages mapped is offered; what is not kept is mapped, and so is all of a frontend that
    /// does not agree.
    PersistentOrMap,
    /// Keeping pages mapped is offered; of what is not kept the data is copied, and so is all of a
    /// frontend that does not agree.
    PersistentOrCopy,
}

impl Policy {
    /// Every policy.
    pub const ALL: [Self; 4] =
        [Self::Map, Self::Copy, Self::PersistentOrMap, Self::PersistentOrCopy];

    /// Whether `feature-persistent` is offered.
    #[must_use]
    pub const fn offers_persistent(self) -> bool {
        matches!(self, Self::PersistentOrMap | Self::PersistentOrCopy)
    }

    /// What is in effect when both ends agreed on persistent grants, or did not.
    #[must_use]
    pub const fn path(self, agreed: bool) -> DataPath {
        match self {
            Self::PersistentOrMap if agreed => DataPath::PersistentOrMap,
            Self::PersistentOrCopy if agreed => DataPath::PersistentOrCopy,
            Self::Map | Self::PersistentOrMap => DataPath::Map,
            Self::Copy | Self::PersistentOrCopy => DataPath::Copy,
        }
    }

    /// The word for it on a command line.
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

/// There is no such policy.
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
    fn persistent_grants_are_used_only_when_offered_and_agreed() {
        for policy in Policy::ALL {
            assert_eq!(policy.as_str().parse(), Ok(policy));
            let [agreed, not] = [true, false].map(|agreed| policy.path(agreed));
            assert_eq!((agreed.keeps(), not.keeps()), (policy.offers_persistent(), false));
            assert_eq!(agreed.copies(), not.copies(), "{policy}");
            assert_eq!(agreed.as_str(), policy.as_str());
        }
        assert_eq!("persistent".parse::<Policy>(), Err(UnknownPolicy));
    }
}
