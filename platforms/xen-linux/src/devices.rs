//! Paths of the kernel's devices, and the errors if they are missing.

use crate::error::OpenError;
use crate::sys::gntalloc::Gntalloc;
use crate::sys::gntdev::Gntdev;
use crate::sys::{EVTCHN, GNTALLOC, GNTDEV};
use pvio_grant_table::DomId;
use pvio_xenbus::Xenstore;
use pvio_xenbus::client::{Client, default_path};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// Paths of the devices; tests use other ones than the system's.
#[derive(Clone, Debug)]
pub(crate) struct Devices {
    dev: PathBuf,
    hypervisor_type: PathBuf,
    guest_type: PathBuf,
    parameters: PathBuf,
    release: PathBuf,
    xenstore: PathBuf,
}

/// First release of Linux in which the gntdev of a PV domain maps in other processes than the one
/// that opened it.
const MAPS_FOR_OTHERS: (u32, u32) = (5, 5);

impl Devices {
    pub(crate) fn of_the_system() -> Self {
        Self {
            dev: "/dev/xen".into(),
            hypervisor_type: "/sys/hypervisor/type".into(),
            guest_type: "/sys/hypervisor/guest_type".into(),
            parameters: "/sys/module/xen_gntdev/parameters".into(),
            release: "/proc/sys/kernel/osrelease".into(),
            xenstore: default_path(),
        }
    }

    pub(crate) fn gntdev(&self) -> Result<Gntdev, OpenError> {
        let fd = self.open(GNTDEV, "xen-gntdev", OFlags::empty())?;
        // In older kernels it is the limit for all mappings together, which is larger; that does no
        // harm.
        let limit = std::fs::read_to_string(self.parameters.join("limit")).ok();
        Ok(Gntdev::new(fd, limit.and_then(|limit| limit.trim().parse().ok())))
    }

    pub(crate) fn gntalloc(&self) -> Result<Gntalloc, OpenError> {
        self.open(GNTALLOC, "xen-gntalloc", OFlags::empty()).map(Gntalloc::new)
    }

    pub(crate) fn evtchn(&self) -> Result<OwnedFd, OpenError> {
        self.open(EVTCHN, "xen-evtchn", OFlags::NONBLOCK)
    }

    pub(crate) fn xenstore(&self) -> Result<Client, OpenError> {
        let path = &self.xenstore;
        Client::connect(path).map_err(|source| OpenError::Xenstore { path: path.clone(), source })
    }

    /// Returns this domain's id.
    pub(crate) fn domid(&self) -> Result<DomId, OpenError> {
        let value = self.xenstore()?.read("domid")?;
        let value = String::from_utf8_lossy(&value).into_owned();
        match value.parse().map(DomId) {
            Ok(id) if id.is_real() => Ok(id),
            _ => Err(OpenError::BadId(value)),
        }
    }

    /// Whether this is a PV domain, which maps grants in its own page tables. In other domains, the
    /// hypervisor translates addresses. If the kernel is too old to report the type, the domain is
    /// taken for one of these.
    pub(crate) fn is_pv(&self) -> bool {
        std::fs::read(&self.guest_type).is_ok_and(|kind| kind.trim_ascii() == b"PV")
    }

    /// Checks that a process can map through a gntdev that another one opened. Before Linux 5.5, a
    /// PV domain's gntdev belonged to the address space of the process that opened it.
    pub(crate) fn maps_for_others(&self) -> Result<(), OpenError> {
        if !self.is_pv() {
            return Ok(());
        }
        let release = std::fs::read_to_string(&self.release).unwrap_or_default();
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().ok());
        match (numbers.next().flatten(), numbers.next().flatten()) {
            (Some(major), Some(minor)) if (major, minor) < MAPS_FOR_OTHERS => {
                Err(OpenError::OldKernel(release.trim().to_owned()))
            }
            // A release that cannot be read is taken for a recent one: a mapping would fail there.
            _ => Ok(()),
        }
    }

    fn open(&self, name: &str, module: &'static str, flags: OFlags) -> Result<OwnedFd, OpenError> {
        let path = self.dev.join(name);
        let flags = flags | OFlags::RDWR | OFlags::CLOEXEC;
        rustix::fs::open(&path, flags, Mode::empty()).map_err(|why| match why {
            // A device node without a driver is treated like a missing one.
            Errno::NOENT | Errno::NODEV | Errno::NXIO if self.on_xen() => {
                OpenError::NoDevice { path, module }
            }
            Errno::NOENT | Errno::NODEV | Errno::NXIO => {
                OpenError::NotXen(self.hypervisor_type.clone())
            }
            Errno::ACCESS | Errno::PERM => OpenError::Denied { path },
            why => OpenError::Device { path, source: why.into() },
        })
    }

    fn on_xen(&self) -> bool {
        std::fs::read(&self.hypervisor_type).is_ok_and(|kind| kind.trim_ascii() == b"xen")
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use pvio_ring::error::{Remedy, Report};
    use std::os::unix::net::UnixListener;

    pub(crate) fn places(dir: &tempfile::TempDir) -> Devices {
        let root = dir.path();
        Devices {
            dev: root.join("dev"),
            hypervisor_type: root.join("type"),
            guest_type: root.join("guest_type"),
            parameters: root.to_owned(),
            release: root.join("release"),
            xenstore: root.join("socket"),
        }
    }

    #[test]
    fn missing_xen_device_is_reported_with_advice() {
        let dir = tempfile::tempdir().unwrap();
        let devices = places(&dir);
        let says = |error: OpenError| {
            let remedy = error.remedy().unwrap_or_default();
            (error.code(), format!("{}; {remedy}", Report(&error)))
        };
        let (code, text) = says(devices.gntdev().unwrap_err());
        assert_eq!(code, "xen-not-a-domain");
        assert!(text.contains("hosted"), "{text}");
        std::fs::write(dir.path().join("type"), "kvm\n").unwrap();
        assert_eq!(devices.gntalloc().unwrap_err().code(), "xen-not-a-domain");
        std::fs::write(dir.path().join("type"), "xen\n").unwrap();
        let (code, text) = says(devices.evtchn().unwrap_err());
        assert_eq!(code, "xen-no-device");
        assert!(
            text.ends_with(
                "dev/evtchn does not exist; load the kernel module (modprobe xen-evtchn)"
            ),
            "{text}"
        );
        let (code, text) = says(devices.domid().unwrap_err());
        assert_eq!(code, "xen-xenstore");
        assert!(text.contains("start xenstored"), "{text}");
    }

    #[test]
    fn is_pv_is_true_only_for_pv_guest_type() {
        let dir = tempfile::tempdir().unwrap();
        let devices = places(&dir);
        assert!(!devices.is_pv());
        for (kind, pv) in [("PV\n", true), ("PVH\n", false), ("HVM\n", false)] {
            std::fs::write(dir.path().join("guest_type"), kind).unwrap();
            assert_eq!(devices.is_pv(), pv);
        }
    }

    #[test]
    fn pv_domain_on_linux_before_5_5_cannot_map_for_others() {
        let dir = tempfile::tempdir().unwrap();
        let devices = places(&dir);
        for (kind, release, can) in [
            ("PV\n", "5.4.0-150-generic\n", false),
            ("PV\n", "4.19.0\n", false),
            ("PV\n", "5.5.0\n", true),
            ("PV\n", "6.1.0-25-amd64\n", true),
            ("PV\n", "unknown", true),
            ("PVH\n", "4.19.0\n", true),
        ] {
            std::fs::write(dir.path().join("guest_type"), kind).unwrap();
            std::fs::write(dir.path().join("release"), release).unwrap();
            assert_eq!(devices.maps_for_others().is_ok(), can, "{kind} {release}");
        }
    }

    #[test]
    fn gntdev_batch_is_bounded_by_kernel_limit() {
        let dir = tempfile::tempdir().unwrap();
        let devices = places(&dir);
        std::fs::create_dir(dir.path().join("dev")).unwrap();
        std::fs::write(dir.path().join("dev/gntdev"), "").unwrap();
        for (limit, at_once) in [("65536\n", 256), ("8\n", 8), ("0\n", 1), ("nonsense", 256)] {
            std::fs::write(dir.path().join("limit"), limit).unwrap();
            assert_eq!(devices.gntdev().unwrap().at_once(), at_once, "{limit}");
        }
    }

    #[test]
    fn invalid_domid_from_xenstore_is_rejected() {
        use std::io::{Read, Write};
        for (value, good) in [("7", true), ("0", true), ("32752", false), ("x", false), ("", false)]
        {
            let dir = tempfile::tempdir().unwrap();
            let devices = places(&dir);
            let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
            let server = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 16 + 6];
                stream.read_exact(&mut request).unwrap();
                assert_eq!(&request[16..], b"domid\0");
                // The reply has the request's header, except for the length.
                request[12..16].copy_from_slice(&(value.len() as u32).to_le_bytes());
                stream.write_all(&request[..16]).unwrap();
                stream.write_all(value.as_bytes()).unwrap();
                stream
            });
            match devices.domid() {
                Ok(id) => assert!(good && id.to_string() == value),
                Err(error) => assert!(!good && error.code() == "xen-bad-id", "{error}"),
            }
            drop(server.join().unwrap());
        }
    }
}
