//! Discard and secure discard for block devices of Linux.
//!
//! A hole that is punched into a block device requests zeroes (`blkdev_fallocate`), for which many
//! devices that support discard have no command. The discard operation of io_uring exists since Linux
//! 6.12 and is never secure. The two ioctls of this crate are those of `blkdiscard(8)` and of Linux's
//! backend. They block until the device has finished, possibly for seconds: do not call them on a thread
//! that must not block.
//! ```
//! use pvio_blockdev::Forget;
//!
//! let file = std::fs::File::open("/dev/null")?;
//! let error = Forget::Discard.range(&file, 0, 4096).unwrap_err();
//! assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput, "not a block device");
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

/// The kind of discard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Forget {
    /// The data is no longer needed, but may remain readable.
    Discard,
    /// The data, and any copy of it that the device has made, must become unreadable.
    Securely,
}

impl Forget {
    /// Discards a range of a block device that is open for writing. Blocks until that is done.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if `device` is not a block device, or the range is not in
    /// whole logical sectors or out of range; [`io::ErrorKind::Unsupported`] if the device does not
    /// support it.
    pub fn range(self, device: impl AsFd, at: u64, len: u64) -> io::Result<()> {
        Ok(self.call(device, [at, len])?)
    }

    /// Returns whether a block device that is open for writing supports this. Discards nothing.
    ///
    /// # Errors
    /// Any error except missing support, for example because the device is open for reading only.
    pub fn is_known(self, device: impl AsFd) -> io::Result<bool> {
        // The kernel checks the device's support before it rejects half a sector (`block/ioctl.c`).
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
        // Another kind of file may use these ioctl numbers for something else.
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
