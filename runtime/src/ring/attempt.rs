//! Operations that a ring must not execute, for tests.
#![allow(unsafe_code)]

use super::Uring;
use crate::buf::IoBuf;
use io_uring::{Probe, opcode};
use std::io;

impl<B: IoBuf> Uring<B> {
    /// Submits an operation with that opcode, without a file and without arguments, and returns its
    /// result: a number, or an error number as a negative one. A restricted ring completes every
    /// operation that it was not enabled for with `EACCES`.
    ///
    /// # Errors
    /// An error of `io_uring_enter`, or operations are in flight.
    pub fn attempt(&mut self, opcode: u8) -> io::Result<i32> {
        if self.in_flight > 0 {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        // A NOP has file -1 and no arguments.
        let mut entry = opcode::Nop::new().build();
        // SAFETY: `Entry` is `struct io_uring_sqe`, of which every byte pattern is valid; the opcode
        // is its first byte.
        unsafe { std::ptr::from_mut(&mut entry).cast::<u8>().write(opcode) };
        // SAFETY: without addresses and lengths the operation accesses no memory of the process.
        unsafe { self.uring.submission().push(&entry) }.map_err(io::Error::other)?;
        self.uring.submit_and_wait(1)?;
        let done = self.uring.completion().next();
        done.map(|done| done.result()).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    /// Calls `io_uring_register` with operations that only an unrestricted ring permits: registering
    /// files, and asking for the kernel's operations.
    ///
    /// # Errors
    /// The errors of both; `EACCES` for a restricted ring.
    pub fn attempt_register(&mut self) -> [io::Result<()>; 2] {
        let submitter = self.uring.submitter();
        [submitter.register_files(&[0]), submitter.register_probe(&mut Probe::new())]
    }
}
