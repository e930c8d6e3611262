//! The requirements of a backend on its domain's platform.

use crate::EventChannels;
use pvio_grant_table::{GrantCopier, GrantMapper};

/// The platform of a backend: everything that a virtual disk or NIC requires of its domain.
/// Implemented for every type that has the parts.
///
/// | operation | purpose |
/// |---|---|
/// | [`GrantMapper::map`] | maps a frontend's rings, and pages whose mappings are cached |
/// | [`GrantMapper::map_each`] | maps the pages of one request or batch |
/// | [`GrantCopier::copy`] | copies between private memory and pages that are not mapped |
/// | [`EventChannels::bind_interdomain`] | binds the event channels that a frontend created |
/// | [`Clone`] | gives each queue its own handle, for its own thread |
///
/// Dropping a mapping unmaps it, and dropping a channel closes it. A backend creates no channels
/// ([`EventChannels::alloc_unbound`]) and grants no pages.
pub trait BackendPlatform: GrantMapper + GrantCopier + EventChannels + Clone {}

impl<P: GrantMapper + GrantCopier + EventChannels + Clone> BackendPlatform for P {}
