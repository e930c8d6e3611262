//! What only block devices of Linux can do: forget sectors, and make them unreadable.
//!
//! A hole punched into a device asks it for zeroes (`blkdev_fallocate`), which many devices that
//! can discard have no command for; io_uring's own discard came with Linux 6.12 and is never secure.
//! The two ioctls below are what `blkdiscard(8)` and Linux's backend use. They block until the device
//! is done, seconds perhaps: call them where nothing waits.
//!
//! ```
//! use pvio_blockdev::Forget;
//!
//! let file = std::fs::File::open("/dev/null")?;
//! let error = Forget::Discard.range(&file, 0, 4096).unwrap_err();
//! assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput, "it is no block device");
//! # Ok::<(), std::io::Error>(())
//! ```

use rustix::fs::{FileType, fstat};
use rustix::io::{Errno, retry_on_intr};
use rustix::ioctl::{Opcode, Setter, ioctl, opcode};
use std::io;
use std::os::fd::AsFd;

/// `BLKDISCARD` and `BLKSECDISCARD` (`linux/fs.h`).
const BLKDISCARD: Opcode = opcode::none(0x12, 119);
const BLKSECDISCARD: Opcode = opcode::none(0x12, 125);

/// How sectors are to be forgotten.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Forget {
    /// What was there is not needed any more; it may be found there still.
    Discard,
    /// What was there must not be found by anybody any more, nor any copy of it that the device
    /// made.
    Securely,
}

impl Forget {
    /// Forgets a range of a block device that is open for writing; waits until it is.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for what is no block device, is not made of whole logical
    /// sectors, or is out of range; [`io::ErrorKind::Unsupported`] if the device cannot.
    pub fn range(self, device: impl AsFd, at: u64, len: u64) -> io::Result<()> {
        Ok(self.call(device, [at, len])?)
    }

    /// Whether a block device that is open for writing can. Nothing is forgotten.
    ///
    /// # Errors
    /// Any but that it cannot: it is open for reading alone, say.
    pub fn is_known(self, device: impl AsFd) -> io::Result<bool> {
        // The kernel looks at the device first and refuses half a sector then (`block/ioctl.c`).
        match self.call(device, [1, 1]) {
            Err(Errno::INVAL) => Ok(true),
            Err(Errno::OPNOTSUPP) => Ok(false),
            Err(error) => Err(error.into()),
            Ok(()) => Err(io::Error::other("half a sector was discarded")),
        }
    }

    #[allow(unsafe_code)]
    fn call(self, device: impl AsFd, range: [u64; 2]) -> Result<(), Errno> {
        let device = device.as_fd();
        // Another kind of file may take these numbers for something else.
        if FileType::from_raw_mode(fstat(device)?.st_mode) != FileType::BlockDevice {
            return Err(Errno::INVAL);
        }
        retry_on_intr(|| match self {
            // SAFETY: this ioctl of a block device, which `device` is, reads a range in bytes, two
            // `u64`, and keeps no pointer to it.
            Self::Discard => unsafe { ioctl(device, Setter::<BLKDISCARD, _>::new(range)) },
            // SAFETY: as the other.
            Self::Securely => unsafe { ioctl(device, Setter::<BLKSECDISCARD, _>::new(range)) },
        })
    }
}
