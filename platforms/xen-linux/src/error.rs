use pvio_xenbus::XsError;
use rustix::io::Errno;
use std::io;
use std::path::PathBuf;

/// Reason why this system cannot be used as a Xen domain, with a remedy.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The kernel does not run on Xen.
    #[error(
        "this system is not a Xen domain ({0} does not say \"xen\"): boot it on Xen, or use the \
         hosted platform, which needs none"
    )]
    NotXen(PathBuf),
    /// The kernel runs on Xen and the device is missing.
    #[error("{path} is not there: `modprobe {module}`")]
    NoDevice {
        /// The device.
        path: PathBuf,
        /// Kernel module that provides it.
        module: &'static str,
    },
    /// This user may not open the device.
    #[error("{path} may not be opened: run as root, or let this user read and write it")]
    Denied {
        /// The device.
        path: PathBuf,
    },
    /// The device cannot be opened for another reason.
    #[error("opening {path}: {source}")]
    Device {
        /// The device.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// xenstore cannot be reached.
    #[error(
        "xenstore cannot be reached at {path} ({source}): in dom0 start xenstored; in a guest see \
         that {path} is there and may be opened"
    )]
    Xenstore {
        /// Path of its socket or device.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// xenstore does not report this domain's id.
    #[error("reading this domain's number from xenstore: {0}")]
    Id(#[from] XsError),
    /// The domain id in xenstore is invalid.
    #[error(
        "the node `domid` in xenstore is {0:?}, not a domain's number; in dom0 run xen-init-dom0"
    )]
    BadId(String),
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
        }
    }
}

/// Reason why a notification of unmapping cannot be requested.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NotifyError {
    /// The pages were mapped together with others, which are unmapped at the same time, with one
    /// notification for all of them.
    #[error("the page was mapped in a batch; map it by itself to be notified of its unmapping")]
    Batch,
    /// The byte is not in the mapping.
    #[error("the byte to clear is not in the mapping")]
    OutOfRange,
    /// The mapping is read-only.
    #[error("a byte of a read-only mapping cannot be cleared")]
    ReadOnly,
    /// The kernel rejected the request.
    #[error("the kernel refused: {0}")]
    Refused(Errno),
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
