//! The platform of a device process: a separate connection to the hypervisor.

use crate::connection::Connection;
use crate::domain::Domain;
use crate::error::DeviceError;
use crate::protocol::{MAX_LISTED, Request, Scope, Status};
use pvio_event_channel::{DeviceDescriptors, DevicePlatform, DeviceScope};
use pvio_grant_table::DomId;

/// Description of the descriptor of one device: the socket of its connection to the hypervisor.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct DeviceDescription {
    domain: u16,
    frontend: u16,
}

impl DeviceDescription {
    /// Returns the domain that the device process acts for.
    #[must_use]
    pub fn domain(&self) -> DomId {
        DomId(self.domain)
    }

    /// Returns the domain that the device belongs to.
    #[must_use]
    pub fn frontend(&self) -> DomId {
        DomId(self.frontend)
    }
}

impl DevicePlatform for Domain {
    type Description = DeviceDescription;
    type Error = DeviceError;
    // The hypervisor ends the uses of grants before it serves a request of a successor.
    const UNMAPS_LATE: bool = false;

    /// Creates a device connection. What the hypervisor enforces for a process that has only its
    /// socket:
    ///
    /// - It gets the memory of [`frontend`](DeviceScope::frontend) and of no other domain, not even
    ///   that of the domain it acts for.
    /// - It binds only ports that the frontend allocated for this domain and that
    ///   [`ports`](DeviceScope::ports) permits, at most [`channels`](DeviceScope::channels) at the
    ///   same time, and closes only those. The events of other ports are in memory that it cannot
    ///   get.
    /// - It has no xenstore and can create no further connection. Another domain that gets the
    ///   number of a destroyed frontend is out of its reach.
    ///
    /// What it does **not** enforce, since the hypervisor is no hardware: the process gets the whole
    /// sharable memory of the frontend, with its grant table, and not only the pages that were
    /// granted to this domain. See the documentation of the crate.
    ///
    /// The connection ends with the last copy of its socket, so the supervisor must not keep one.
    /// The hypervisor then closes its ports and ends its uses of grants. It does not depend on the
    /// connection of the supervisor. Requests of other connections, such as that of a successor, are
    /// served after that.
    fn device_descriptors(
        &self,
        scope: &DeviceScope,
    ) -> Result<DeviceDescriptors<DeviceDescription>, DeviceError> {
        let given = scope.ports.as_ref().map_or(0, Vec::len);
        if given > MAX_LISTED {
            return Err(DeviceError::Ports { given, most: MAX_LISTED });
        }
        let frontend = scope.frontend;
        if !frontend.is_real() {
            return Err(DeviceError::NoFrontend(frontend));
        }
        let request = Request::Device(Scope {
            frontend,
            channels: u32::try_from(scope.channels).unwrap_or(u32::MAX),
            ports: scope.ports.clone(),
        });
        let asked = self.inner().connection.call::<1>(&request);
        let (reply, fds) = asked.map_err(|_| DeviceError::Lost)?;
        let fds = match (reply.status, fds) {
            (Status::Done, Some(fds)) => fds.into(),
            (Status::NoDomain, _) => return Err(DeviceError::NoFrontend(frontend)),
            (Status::Denied, _) => return Err(DeviceError::Denied),
            (Status::NoResources, _) => return Err(DeviceError::NoResources),
            _ => return Err(DeviceError::Lost),
        };
        let description = DeviceDescription { domain: self.id().0, frontend: frontend.0 };
        Ok(DeviceDescriptors { description, fds })
    }

    fn from_descriptors(
        descriptors: DeviceDescriptors<DeviceDescription>,
    ) -> Result<Self, DeviceError> {
        let DeviceDescriptors { description, fds } = descriptors;
        let [socket] =
            <[_; 1]>::try_from(fds).map_err(|fds| DeviceError::Descriptors(fds.len()))?;
        Ok(Self::new(description.domain(), Connection::from_socket(socket), None))
    }
}
