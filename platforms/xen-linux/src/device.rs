//! The platform of a device process: the supervisor opens the devices, and the device process uses
//! the descriptors.

use crate::descriptors::{Descriptors, OfDevice};
use crate::devices::Devices;
use crate::domain::XenDomain;
use crate::error::OpenError;
use crate::sys;
use crate::sys::evtchn;
use crate::sys::gntdev::{Gntdev, MOST_AT_ONCE};
use pvio_event_channel::{DeviceDescriptors, DevicePlatform, DeviceScope};
use pvio_grant_table::DomId;
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Numbers of all `ioctl` requests that a device process makes on these descriptors, for a filter of
/// system calls. `mmap`, `munmap`, `read`, `write`, `poll` and `close` are used besides.
/// [`Mapping::notify_unmap`](crate::Mapping::notify_unmap), which no backend uses, needs another one.
pub const DEVICE_IOCTLS: [u32; 7] = sys::OF_DEVICE;

/// Whether the kernel restricts the evtchn descriptors of a device to the frontend's domain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum EventRestriction {
    /// The descriptors bind to ports of the frontend's domain only (`IOCTL_EVTCHN_RESTRICT_DOMID`).
    Frontend,
    /// The kernel does not know the request: the descriptors bind to ports of any domain that
    /// allocated one for this domain.
    OldKernel,
    /// The frontend is dom0, which the kernel does not accept as a restriction.
    Dom0,
}

/// Description of the descriptors of one device: first those of gntdev, then those of evtchn.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct DeviceDescription {
    domain: u16,
    frontend: u16,
    pv: bool,
    grants_at_once: usize,
    gntdevs: usize,
    evtchns: usize,
    restriction: EventRestriction,
}

impl DeviceDescription {
    /// Returns the domain that the device process runs in.
    #[must_use]
    pub fn domain(&self) -> DomId {
        DomId(self.domain)
    }

    /// Returns the domain that the device belongs to.
    #[must_use]
    pub fn frontend(&self) -> DomId {
        DomId(self.frontend)
    }

    /// Returns whether the kernel restricts the event channels to the frontend's domain. It is for
    /// the report of the supervisor; the device process does not depend on it.
    #[must_use]
    pub fn restriction(&self) -> EventRestriction {
        self.restriction
    }

    /// Returns the number of descriptors.
    #[must_use]
    pub fn count(&self) -> usize {
        self.gntdevs.saturating_add(self.evtchns)
    }
}

impl DevicePlatform for XenDomain {
    type Description = DeviceDescription;
    type Error = OpenError;
    // gntdev checks repeatedly whether pages are still in use.
    const UNMAPS_LATE: bool = true;

    /// Opens `/dev/xen/gntdev` once for each queue and `/dev/xen/evtchn` once for each event
    /// channel. At least one of each is opened.
    ///
    /// What the kernel enforces for a process that has only these descriptors:
    ///
    /// - evtchn: only ports of [`frontend`](DeviceScope::frontend) can be bound, and only those that
    ///   it allocated for this domain. The descriptor notifies and closes only ports that were bound
    ///   through it. [`DeviceDescription::restriction`] reports the exceptions: a frontend in dom0,
    ///   and a kernel without that request. The kernel does not distinguish ports of one frontend,
    ///   so [`ports`](DeviceScope::ports) has no effect.
    /// - gntdev: **nothing.** Through it, a process can map and copy *every* page that *any* guest
    ///   has granted to this domain, such as the rings and buffers of other devices. A grant is for a
    ///   domain, not for a process, and the kernel has no request that restricts a gntdev descriptor
    ///   to one domain. Guests whose devices must not share that risk need separate driver domains:
    ///   the hypervisor enforces for which domain a page is granted. By `SET_UNMAP_NOTIFY`, which
    ///   no backend uses and [`DEVICE_IOCTLS`] does not contain, it could also raise events on
    ///   other channels of this domain.
    ///
    /// When the process ends, the kernel unmaps all pages and closes all ports of the descriptors.
    /// The supervisor must not keep copies of the descriptors, since that would keep them open.
    fn device_descriptors(
        &self,
        scope: &DeviceScope,
    ) -> Result<DeviceDescriptors<DeviceDescription>, OpenError> {
        match &self.inner().descriptors {
            Descriptors::System(devices) => {
                open(devices, self.inner().id, self.inner().maps_own, scope)
            }
            Descriptors::Device(_) => Err(OpenError::NothingToOpen),
        }
    }

    /// Each clone of the domain maps through one of the gntdev descriptors, in turn. A channel uses
    /// one of the evtchn descriptors until it is dropped;
    /// [`NoPorts`](pvio_event_channel::EventError::NoPorts) if all are in use. A remote domain other
    /// than the frontend is rejected even if the kernel does not restrict the descriptors.
    fn from_descriptors(
        descriptors: DeviceDescriptors<DeviceDescription>,
    ) -> Result<Self, OpenError> {
        let DeviceDescriptors { description, fds } = descriptors;
        let DeviceDescription { domain, frontend, pv, grants_at_once, gntdevs, evtchns, .. } =
            description;
        let (given, expected) = (fds.len(), gntdevs.saturating_add(evtchns));
        if given != expected || gntdevs == 0 {
            return Err(OpenError::Descriptors { given, expected: expected.max(1) });
        }
        let mut fds = fds.into_iter();
        let gntdevs: Vec<_> = fds
            .by_ref()
            .take(gntdevs)
            .map(|fd| Arc::new(Gntdev::new(fd, Some(grants_at_once))))
            .collect();
        let of = Descriptors::Device(OfDevice::new(DomId(frontend), gntdevs, fds));
        Self::from_parts(DomId(domain), pv, of, Err(OpenError::NothingToOpen))
    }
}

fn open(
    devices: &Devices,
    domain: DomId,
    pv: bool,
    scope: &DeviceScope,
) -> Result<DeviceDescriptors<DeviceDescription>, OpenError> {
    devices.maps_for_others()?;
    let (gntdevs, evtchns) = (scope.queues.max(1), scope.channels.max(1));
    let mut fds = Vec::with_capacity(gntdevs.saturating_add(evtchns));
    let mut grants_at_once = MOST_AT_ONCE;
    for _ in 0..gntdevs {
        let gntdev = devices.gntdev()?;
        grants_at_once = gntdev.at_once();
        fds.push(gntdev.into_fd());
    }
    let mut restriction = EventRestriction::Frontend;
    for _ in 0..evtchns {
        let evtchn = devices.evtchn()?;
        restriction = restrict(&evtchn, scope.frontend)?;
        fds.push(evtchn);
    }
    let description = DeviceDescription {
        domain: domain.0,
        frontend: scope.frontend.0,
        pv,
        grants_at_once,
        gntdevs,
        evtchns,
        restriction,
    };
    Ok(DeviceDescriptors { description, fds })
}

fn restrict(evtchn: &OwnedFd, frontend: DomId) -> Result<EventRestriction, OpenError> {
    if frontend == DomId::DOM0 {
        return Ok(EventRestriction::Dom0);
    }
    match evtchn::restrict(evtchn, frontend.0) {
        Ok(()) => Ok(EventRestriction::Frontend),
        Err(Errno::NOSYS) => Ok(EventRestriction::OldKernel),
        Err(why) => Err(OpenError::Restrict { frontend, source: why.into() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::tests::places;
    use pvio_event_channel::{EventChannels, EventError, Port};
    use pvio_grant_table::{Access, GrantError, GrantMapper, GrantRef, GrantStatus, Granter};

    const SCOPE: DeviceScope =
        DeviceScope { frontend: DomId(7), queues: 2, channels: 3, ports: None };

    fn description() -> DeviceDescription {
        DeviceDescription {
            domain: 1,
            frontend: 7,
            pv: false,
            grants_at_once: 8,
            gntdevs: 2,
            evtchns: 3,
            restriction: EventRestriction::Frontend,
        }
    }

    /// Descriptors whose every `ioctl` fails.
    fn files(count: usize) -> Vec<OwnedFd> {
        let file = |_| rustix::fs::memfd_create("fake", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        (0..count).map(file).collect()
    }

    fn device() -> XenDomain {
        let descriptors = DeviceDescriptors { description: description(), fds: files(5) };
        XenDomain::from_descriptors(descriptors).unwrap()
    }

    fn of_device(domain: &XenDomain) -> &OfDevice {
        let Descriptors::Device(of) = &domain.inner().descriptors else { panic!() };
        of
    }

    #[test]
    fn descriptors_are_opened_once_per_queue_and_channel() {
        let dir = tempfile::tempdir().unwrap();
        let devices = places(&dir);
        let open = |frontend, queues, channels| {
            let scope = DeviceScope { frontend, queues, channels, ports: None };
            open(&devices, DomId(1), false, &scope)
        };
        assert_eq!(open(DomId(7), 1, 1).unwrap_err().code(), "xen-not-a-domain");
        std::fs::create_dir(dir.path().join("dev")).unwrap();
        std::fs::write(dir.path().join("dev/gntdev"), "").unwrap();
        std::fs::write(dir.path().join("limit"), "8").unwrap();
        assert_eq!(open(DomId(7), 1, 1).unwrap_err().code(), "xen-not-a-domain");
        std::fs::write(dir.path().join("dev/evtchn"), "").unwrap();
        // A plain file is no evtchn, and that is not mistaken for an old kernel.
        assert_eq!(open(DomId(7), 1, 1).unwrap_err().code(), "xen-restrict");
        let opened = open(DomId::DOM0, 2, 3).unwrap();
        let expected =
            DeviceDescription { frontend: 0, restriction: EventRestriction::Dom0, ..description() };
        assert_eq!((opened.description, opened.fds.len()), (expected, 5));
        let opened = open(DomId::DOM0, 0, 0).unwrap();
        assert_eq!((opened.description.count(), opened.fds.len()), (2, 2));
        std::fs::write(dir.path().join("guest_type"), "PV\n").unwrap();
        std::fs::write(dir.path().join("release"), "5.4.1\n").unwrap();
        assert_eq!(open(DomId::DOM0, 1, 1).unwrap_err().code(), "xen-old-kernel");
    }

    #[test]
    fn descriptors_that_do_not_match_description_are_rejected() {
        let made = |count| {
            let fds = files(count);
            XenDomain::from_descriptors(DeviceDescriptors { description: description(), fds })
        };
        for count in [0, 4, 6] {
            assert_eq!(made(count).unwrap_err().code(), "xen-descriptors");
        }
        assert_eq!(made(5).unwrap().id(), DomId(1));
        let none = DeviceDescription { gntdevs: 0, ..description() };
        let none = DeviceDescriptors { description: none, fds: files(3) };
        assert_eq!(XenDomain::from_descriptors(none).unwrap_err().code(), "xen-descriptors");
    }

    #[test]
    fn device_opens_nothing_and_grants_nothing() {
        let device = device();
        assert_eq!(device.xenstore().err().unwrap().code(), "xen-nothing-to-open");
        assert_eq!(device.can_grant().unwrap_err().code(), "xen-nothing-to-open");
        assert_eq!(device.device_descriptors(&SCOPE).unwrap_err().code(), "xen-nothing-to-open");
        let denied = GrantError::Refused(GrantStatus::PermissionDenied);
        assert_eq!(device.alloc_pages(1).unwrap_err(), denied);
    }

    #[test]
    fn clones_map_through_descriptors_in_turn() {
        let device = device();
        let of = of_device(&device);
        let (second, third) = (device.clone(), device.clone());
        let all = [device.gntdev(), second.gntdev(), third.gntdev()];
        assert!(Arc::ptr_eq(all[0], of.gntdev_at(0)) && Arc::ptr_eq(all[1], of.gntdev_at(1)));
        assert!(Arc::ptr_eq(all[2], of.gntdev_at(0)));
        assert_eq!(all[0].at_once(), 8);
    }

    #[test]
    fn failed_ioctl_of_device_is_reported_for_each_page() {
        let device = device();
        let refused = GrantStatus::GeneralError;
        let mapped = device.map(DomId(7), &[GrantRef(8)], Access::ReadWrite);
        assert_eq!(mapped.err(), Some(refused));
        let mut seen = Vec::new();
        let grefs = [GrantRef(8); 10];
        device.map_each(DomId(7), &grefs, Access::ReadOnly, &mut |i, mapped| {
            seen.push((i, mapped.err()));
        });
        assert_eq!(seen, (0..10).map(|i| (i, Some(refused))).collect::<Vec<_>>());
    }

    #[test]
    fn evtchn_of_failed_bind_or_other_domain_stays_available() {
        let device = device();
        let bind = |domain| device.bind_interdomain(domain, Port(1)).map(|_| ()).unwrap_err();
        for _ in 0..4 {
            assert_eq!(bind(DomId(7)), EventError::Hypervisor, "ENOTTY of a plain file");
            assert_eq!(bind(DomId(8)), EventError::BadPort, "other domain");
        }
        let of = of_device(&device);
        let all: Vec<_> = (0..3).map(|_| of.evtchn(DomId(7)).unwrap()).collect();
        assert!(of.evtchn(DomId(7)).is_err());
        drop(all);
    }

    #[cfg(feature = "serde")]
    #[test]
    fn description_round_trips_as_json() {
        let text = serde_json::to_string(&description()).unwrap();
        assert_eq!(serde_json::from_str::<DeviceDescription>(&text).unwrap(), description());
    }
}
