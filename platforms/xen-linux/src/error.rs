use pvio_ring::DomId;
use pvio_ring::error::Remedy;
use pvio_xenbus::XsError;
use rustix::io::Errno;
use std::borrow::Cow;
use std::io;
use std::path::PathBuf;

/// Reason why this system cannot be used as a Xen domain, with a remedy.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The kernel does not run on Xen.
    #[error("this system is not a Xen domain: {0} does not contain \"xen\"")]
    NotXen(PathBuf),
    /// The kernel runs on Xen and the device is missing.
    #[error("{path} does not exist")]
    NoDevice {
        /// The device.
        path: PathBuf,
        /// Kernel module that provides it.
        module: &'static str,
    },
    /// This user may not open the device.
    #[error("{path} cannot be opened: permission denied")]
    Denied {
        /// The device.
        path: PathBuf,
    },
    /// The device cannot be opened for another reason.
    #[error("{path} cannot be opened")]
    Device {
        /// The device.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// xenstore cannot be reached.
    #[error("xenstore cannot be reached at {path}")]
    Xenstore {
        /// Path of its socket or device.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// xenstore does not report this domain's id.
    #[error("the id of this domain cannot be read from xenstore")]
    Id(#[from] XsError),
    /// The domain id in xenstore is invalid.
    #[error("the node `domid` in xenstore is {0:?}, which is not a domain id")]
    BadId(String),
    /// A process other than the one that opened it cannot map through gntdev.
    #[error("in a PV domain on Linux {0}, only the process that opens gntdev can map through it")]
    OldKernel(String),
    /// The kernel rejected the restriction of an evtchn descriptor to one domain.
    #[error("an evtchn descriptor cannot be restricted to domain {frontend}")]
    Restrict {
        /// The domain.
        frontend: DomId,
        /// Error of the system.
        source: io::Error,
    },
    /// The descriptors of a device do not match their description.
    #[error("a device has {given} descriptors, expected {expected}")]
    Descriptors {
        /// Number of descriptors that were given.
        given: usize,
        /// Number that the description requires.
        expected: usize,
    },
    /// The platform was made from the descriptors of one device.
    #[error("a platform that was made from descriptors opens no device and grants no pages")]
    NothingToOpen,
}

impl Remedy for OpenError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        Some(match self {
            Self::NotXen(_) => {
                "boot this machine on Xen, or use the hosted platform, which does not need Xen"
                    .into()
            }
            Self::NoDevice { module, .. } => {
                format!("load the kernel module (modprobe {module})").into()
            }
            Self::Denied { .. } => {
                "run as root, or give this user permission to read and write it".into()
            }
            Self::Device { .. }
            | Self::Restrict { .. }
            | Self::Descriptors { .. }
            | Self::NothingToOpen => return None,
            Self::OldKernel(_) => {
                "boot Linux 5.5 or later, or serve devices in the process that opens gntdev".into()
            }
            Self::Xenstore { path, .. } => format!(
                "start xenstored in dom0, or, in a guest, check that {} exists and can be opened",
                path.display()
            )
            .into(),
            Self::Id(error) => return error.remedy(),
            Self::BadId(_) => "run xen-init-dom0 in dom0".into(),
        })
    }
}

impl OpenError {
    /// A short stable code for logs and counters.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NotXen(_) => "xen-not-a-domain",
            Self::NoDevice { .. } => "xen-no-device",
            Self::Denied { .. } => "xen-denied",
            Self::Device { .. } => "xen-device",
            Self::Xenstore { .. } => "xen-xenstore",
            Self::Id(_) => "xen-id",
            Self::BadId(_) => "xen-bad-id",
            Self::OldKernel(_) => "xen-old-kernel",
            Self::Restrict { .. } => "xen-restrict",
            Self::Descriptors { .. } => "xen-descriptors",
            Self::NothingToOpen => "xen-nothing-to-open",
        }
    }
}

/// Reason why a notification of unmapping cannot be requested.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NotifyError {
    /// The pages were mapped together with others, which are unmapped at the same time, with one
    /// notification for all of them.
    #[error("a page that was mapped in a batch cannot notify of its unmapping")]
    Batch,
    /// The byte is not in the mapping.
    #[error("the byte to clear is not in the mapping")]
    OutOfRange,
    /// The mapping is read-only.
    #[error("a byte of a read-only mapping cannot be cleared")]
    ReadOnly,
    /// The kernel rejected the request.
    #[error("the kernel rejected the request")]
    Refused(#[source] Errno),
}

impl NotifyError {
    /// A short stable code for logs and counters.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Batch => "unmap-notify-batch",
            Self::OutOfRange => "unmap-notify-out-of-range",
            Self::ReadOnly => "unmap-notify-read-only",
            Self::Refused(_) => "unmap-notify-refused",
        }
    }
}

#[cfg(test)]
mod remedy_tests {
    use super::*;
    use pvio_ring::error::without_remedy;

    #[test]
    fn errors_have_a_remedy_or_are_listed() {
        let (path, source) = (|| PathBuf::from("/a"), || io::Error::other("x"));
        let none = without_remedy(&[
            &OpenError::NotXen(path()),
            &OpenError::NoDevice { path: path(), module: "x" },
            &OpenError::Denied { path: path() },
            &OpenError::Device { path: path(), source: source() },
            &OpenError::Xenstore { path: path(), source: source() },
            &OpenError::Id(XsError::Closed),
            &OpenError::BadId("x".into()),
            &OpenError::OldKernel("x".into()),
            &OpenError::Restrict { frontend: DomId(1), source: source() },
            &OpenError::Descriptors { given: 1, expected: 2 },
            &OpenError::NothingToOpen,
        ]);
        assert_eq!(none, ["Device", "Restrict", "Descriptors", "NothingToOpen"]);
    }
}
