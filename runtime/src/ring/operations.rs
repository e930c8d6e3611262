//! Operations that a ring may execute.

use io_uring::opcode;
use io_uring::register::Restriction;
use io_uring::squeue::Flags;

/// Operations that a ring may execute once it is [enabled](super::DisabledUring::enable). Each stands
/// for the methods of [`Uring`](super::Uring) with that purpose. The kernel completes every other
/// operation with `EACCES`.
///
/// ```
/// use pvio_runtime::Operations;
///
/// const DISK: Operations = Operations::READ.and(Operations::WRITE).and(Operations::SYNC);
/// assert!(DISK.has(Operations::WRITE) && !DISK.has(Operations::POLL));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Operations(u8);

/// `io_uring_register` operations (`linux/io_uring.h`).
mod register {
    pub const REGISTER_BUFFERS: u8 = 0;
    pub const UNREGISTER_BUFFERS: u8 = 1;
    pub const UNREGISTER_FILES: u8 = 3;
    pub const REGISTER_SYNC_CANCEL: u8 = 24;
}

/// Each operation and its opcodes.
const OPCODES: [(Operations, &[u8]); 5] = [
    (Operations::READ, &[opcode::Read::CODE, opcode::Readv::CODE, opcode::ReadFixed::CODE]),
    (Operations::WRITE, &[opcode::Write::CODE, opcode::Writev::CODE, opcode::WriteFixed::CODE]),
    (Operations::SYNC, &[opcode::Fsync::CODE]),
    (Operations::ALLOCATE, &[opcode::Fallocate::CODE]),
    (Operations::POLL, &[opcode::PollAdd::CODE]),
];

impl Operations {
    /// Reading from files and streams.
    pub const READ: Self = Self(1);
    /// Writing to files and streams.
    pub const WRITE: Self = Self(1 << 1);
    /// Flushing a file.
    pub const SYNC: Self = Self(1 << 2);
    /// `fallocate`.
    pub const ALLOCATE: Self = Self(1 << 3);
    /// Waiting until a file is readable.
    pub const POLL: Self = Self(1 << 4);
    /// Registering memory.
    pub const REGISTER: Self = Self(1 << 5);
    /// All operations of a [`Uring`](super::Uring).
    pub const ALL: Self = Self((1 << 6) - 1);

    /// Returns both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Returns whether all of `other` are included.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Returns the opcodes of the operations.
    pub fn opcodes(self) -> impl Iterator<Item = u8> {
        let included = OPCODES.into_iter().filter(move |(operation, _)| self.has(*operation));
        included.flat_map(|(_, opcodes)| opcodes.iter().copied())
    }

    /// Returns what the kernel is to permit.
    pub(super) fn restrictions(self, fixed_files: bool, cancel: bool) -> Vec<Restriction> {
        let fixed = Flags::FIXED_FILE.bits();
        let mut all: Vec<_> = self.opcodes().map(Restriction::sqe_op).collect();
        all.push(if fixed_files {
            Restriction::sqe_flags_required(fixed)
        } else {
            Restriction::sqe_flags_allowed(fixed)
        });
        // For the end of the ring.
        all.push(Restriction::register_op(register::UNREGISTER_FILES));
        all.push(Restriction::register_op(register::UNREGISTER_BUFFERS));
        if cancel {
            all.push(Restriction::register_op(register::REGISTER_SYNC_CANCEL));
        }
        if self.has(Self::REGISTER) {
            all.push(Restriction::register_op(register::REGISTER_BUFFERS));
        }
        all
    }
}
