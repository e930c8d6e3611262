//! The platform of a device process, which may open nothing.

use crate::{BackendPlatform, DomId, Port};
use core::fmt::Debug;
use pvio_ring::error::Remedy;
use std::os::fd::OwnedFd;
use std::vec::Vec;

/// What one device process may reach through its platform.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceScope {
    /// Domain that the device belongs to.
    pub frontend: DomId,
    /// Number of queues. Each maps pages through its own handle, a clone of the platform.
    pub queues: usize,
    /// Number of event channels that may be open at the same time.
    pub channels: usize,
    /// Ports of the frontend that may be bound. `None` permits every port that the frontend
    /// allocated for this domain. A platform that cannot restrict ports ignores it.
    pub ports: Option<Vec<Port>>,
}

/// Descriptors for a device process, and what they are.
#[derive(Debug)]
pub struct DeviceDescriptors<D> {
    /// Plain data that crosses to the other process together with the descriptors.
    pub description: D,
    /// Descriptors, in the order that [`DevicePlatform::from_descriptors`] expects.
    pub fds: Vec<OwnedFd>,
}

/// A platform whose descriptors one process opens and another one uses.
///
/// The supervisor calls [`device_descriptors`](Self::device_descriptors) and passes the result to a
/// device process, which has no right to open anything. The device process calls
/// [`from_descriptors`](Self::from_descriptors) and has a [`BackendPlatform`] for one device. When
/// that process ends, for any reason, its mappings are removed and its ports are closed. A
/// later process may then map the same grants and bind the same ports of the frontend, whether the
/// supervisor is still the same process or not.
pub trait DevicePlatform: BackendPlatform + Sized {
    /// Plain data that describes the descriptors.
    type Description: Clone + Debug + Send + 'static;
    /// Reason of a failure.
    type Error: Remedy + Send + Sync + 'static;

    /// Whether pages that a process mapped for I/O may stay mapped for a while after the process and
    /// its I/O have ended.
    const UNMAPS_LATE: bool;

    /// Opens the descriptors for the process of one device, and for nothing else.
    ///
    /// # Errors
    /// The descriptors could not be opened.
    fn device_descriptors(
        &self,
        scope: &DeviceScope,
    ) -> Result<DeviceDescriptors<Self::Description>, Self::Error>;

    /// Returns the platform of a device, without opening a file. It has no access to xenstore, and
    /// grants no pages.
    ///
    /// # Errors
    /// The descriptors do not match the description.
    fn from_descriptors(
        descriptors: DeviceDescriptors<Self::Description>,
    ) -> Result<Self, Self::Error>;
}
