//! One `ioctl` call.

use core::ffi::c_void;
use rustix::io::Errno;
use rustix::ioctl::{Direction, Ioctl, IoctlOutput, Opcode, opcode};
use std::os::fd::OwnedFd;

/// `_IOC(_IOC_NONE, group, number, size)`: the encoding of every ioctl of these devices, whatever
/// the direction of its argument.
pub(super) const fn code(group: u8, number: u8, size: usize) -> Opcode {
    opcode::from_components(Direction::None, group, number, size)
}

/// Calls the device with an argument that it may read and write, and returns its result.
///
/// # Safety
/// `fd` is the device that `code` belongs to, and `arg` (with everything that it points to) is laid
/// out as the device expects for `code`, initialised, and valid for it to read and write until this
/// returns.
pub(super) unsafe fn call<T>(fd: &OwnedFd, code: Opcode, arg: &mut T) -> Result<i32, Errno> {
    let arg = core::ptr::from_mut(arg).cast();
    // SAFETY: the caller's promise; the kernel keeps no pointer to the argument afterwards.
    rustix::io::retry_on_intr(|| unsafe { rustix::ioctl::ioctl(fd, Call { code, arg }) })
}

struct Call {
    code: Opcode,
    arg: *mut c_void,
}

// SAFETY: created only by `call`, whose caller vouches for code and argument; the output is the
// number that the kernel returned.
unsafe impl Ioctl for Call {
    type Output = i32;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.code
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.arg
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<i32> {
        Ok(out)
    }
}
