//! How a queue reaches its guest's pages.

use crate::Platform;
use core::fmt;
use core::str::FromStr;
use pvio_grant_table::policy::{Kept, Mapped};
use pvio_grant_table::{CopyOp, GrantCopier};

/// How a vif's packets get out of the guest's pages and into them. There is no keeping of pages
/// here: no frontend has promised that its grants stay (see
/// [`GrantsStay`](pvio_grant_table::policy::GrantsStay) and
/// [`Queue::keep_mapped`](super::Queue::keep_mapped)).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Policy {
    /// The hypervisor copies.
    #[default]
    Copy,
    /// The pages of each batch are mapped, copied from or to, and unmapped.
    Map,
}

impl Policy {
    /// Every policy.
    pub const ALL: [Self; 2] = [Self::Copy, Self::Map];

    /// A word for command lines and logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::Map => "map",
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
#[error("not one of: copy, map")]
pub struct UnknownPolicy;

impl FromStr for Policy {
    type Err = UnknownPolicy;

    fn from_str(word: &str) -> Result<Self, UnknownPolicy> {
        Self::ALL.into_iter().find(|policy| policy.as_str() == word).ok_or(UnknownPolicy)
    }
}

pub(super) enum Reach<P: Platform> {
    Copy,
    Map,
    Keep(Kept<P>),
}

impl<P: Platform> From<Policy> for Reach<P> {
    fn from(policy: Policy) -> Self {
        match policy {
            Policy::Copy => Self::Copy,
            Policy::Map => Self::Map,
        }
    }
}

/// The way to the guest's pages.
pub(super) struct Pages<'a, P: Platform> {
    pub platform: &'a P,
    pub reach: &'a Reach<P>,
}

impl<P: Platform> GrantCopier for Pages<'_, P> {
    fn copy(&self, ops: &mut [CopyOp<'_>]) {
        match self.reach {
            Reach::Copy => self.platform.copy(ops),
            Reach::Map => Mapped::new(self.platform).copy(ops),
            Reach::Keep(kept) => kept.copy(ops),
        }
    }
}
