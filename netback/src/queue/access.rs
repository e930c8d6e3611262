//! Access of a queue to its guest's pages.

use super::staged::Staged;
use crate::stats::Stats;
use core::fmt;
use core::str::FromStr;
use pvio_event_channel::BackendPlatform;
use pvio_grant_table::policy::{CachedMappings, Mapped};
use pvio_grant_table::{CopyOp, GrantCopier};

/// How a vif accesses the guest's pages. There is no policy with cached mappings: those require a
/// guest's promise that its grants stay (see [`GrantsStay`](pvio_grant_table::policy::GrantsStay)),
/// which it makes only for the pages that it stages over the control ring. Staged pages are
/// accessed through their mappings under every policy.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Policy {
    /// Grant copies by the hypervisor.
    #[default]
    Copy,
    /// The pages of each batch are mapped, copied from or to, and unmapped.
    Map,
}

impl Policy {
    /// Every policy.
    pub const ALL: [Self; 2] = [Self::Copy, Self::Map];

    /// Returns the policy's name for command lines and logs.
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

/// Error: no such policy.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not one of: copy, map")]
pub struct UnknownPolicy;

impl FromStr for Policy {
    type Err = UnknownPolicy;

    fn from_str(word: &str) -> Result<Self, UnknownPolicy> {
        Self::ALL.into_iter().find(|policy| policy.as_str() == word).ok_or(UnknownPolicy)
    }
}

pub(super) enum PageAccess<P: BackendPlatform> {
    Copy,
    Map,
    Cached(CachedMappings<P>),
}

impl<P: BackendPlatform> From<Policy> for PageAccess<P> {
    fn from(policy: Policy) -> Self {
        match policy {
            Policy::Copy => Self::Copy,
            Policy::Map => Self::Map,
        }
    }
}

/// Access to the guest's pages.
pub(super) struct Pages<'a, P: BackendPlatform> {
    pub platform: &'a P,
    pub access: &'a PageAccess<P>,
    /// Staged pages, if there are any.
    pub staged: Option<&'a Staged<P::Mapping>>,
    pub stats: &'a Stats,
}

impl<P: BackendPlatform> GrantCopier for Pages<'_, P> {
    fn copy(&self, ops: &mut [CopyOp<'_>]) {
        match self.staged {
            None => Unstaged(self).copy(ops),
            Some(staged) => self.stats.count_staged(staged.copy(ops, &Unstaged(self))),
        }
    }
}

struct Unstaged<'a, 'b, P: BackendPlatform>(&'a Pages<'b, P>);

impl<P: BackendPlatform> GrantCopier for Unstaged<'_, '_, P> {
    fn copy(&self, ops: &mut [CopyOp<'_>]) {
        let Pages { platform, access, .. } = *self.0;
        match access {
            PageAccess::Copy => platform.copy(ops),
            PageAccess::Map => Mapped::new(platform).copy(ops),
            PageAccess::Cached(mappings) => mappings.copy(ops),
        }
    }
}
