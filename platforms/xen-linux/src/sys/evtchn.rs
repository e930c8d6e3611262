//! `/dev/xen/evtchn`: event channels.

use super::ioctl::{call, code};
use rustix::io::Errno;
use rustix::ioctl::Opcode;
use std::os::fd::OwnedFd;

/// `struct ioctl_evtchn_bind_interdomain`
#[repr(C)]
struct BindInterdomain {
    remote_domain: u32,
    remote_port: u32,
}

const _: () = assert!(size_of::<BindInterdomain>() == 8);

pub(super) const BIND_INTERDOMAIN: Opcode = code(b'E', 1, size_of::<BindInterdomain>());
/// The argument is one `unsigned int`, as for the codes below.
pub(super) const BIND_UNBOUND_PORT: Opcode = code(b'E', 2, size_of::<u32>());
pub(super) const UNBIND: Opcode = code(b'E', 3, size_of::<u32>());
pub(super) const NOTIFY: Opcode = code(b'E', 4, size_of::<u32>());
/// Without an argument.
pub(super) const RESET: Opcode = code(b'E', 5, 0);
/// The argument is a `domid_t`.
pub(super) const RESTRICT_DOMID: Opcode = code(b'E', 6, size_of::<u16>());

/// Allocates a port that `remote` may bind to.
pub(crate) fn alloc_unbound(fd: &OwnedFd, mut remote: u32) -> Result<u32, Errno> {
    // SAFETY: the argument of this ioctl.
    port(unsafe { call(fd, BIND_UNBOUND_PORT, &mut remote) }?)
}

/// Allocates a port that is bound to one of `remote_domain`.
pub(crate) fn bind_interdomain(
    fd: &OwnedFd,
    remote_domain: u32,
    remote_port: u32,
) -> Result<u32, Errno> {
    let mut bind = BindInterdomain { remote_domain, remote_port };
    // SAFETY: the struct of this ioctl.
    port(unsafe { call(fd, BIND_INTERDOMAIN, &mut bind) }?)
}

/// Closes a port.
pub(crate) fn unbind(fd: &OwnedFd, mut port: u32) -> Result<(), Errno> {
    // SAFETY: the argument of this ioctl.
    unsafe { call(fd, UNBIND, &mut port) }.map(drop)
}

/// Notifies the other end of a port.
pub(crate) fn notify(fd: &OwnedFd, mut port: u32) -> Result<(), Errno> {
    // SAFETY: the argument of this ioctl.
    unsafe { call(fd, NOTIFY, &mut port) }.map(drop)
}

/// Discards the stored events, which may be those of a closed port.
pub(crate) fn reset(fd: &OwnedFd) -> Result<(), Errno> {
    // SAFETY: this ioctl has no argument; the kernel ignores the address.
    unsafe { call(fd, RESET, &mut 0_u32) }.map(drop)
}

/// Restricts the descriptor permanently: new ports can be bound to this domain only.
pub(crate) fn restrict(fd: &OwnedFd, mut domain: u16) -> Result<(), Errno> {
    // SAFETY: the struct of this ioctl is one `domid_t`.
    unsafe { call(fd, RESTRICT_DOMID, &mut domain) }.map(drop)
}

fn port(answer: i32) -> Result<u32, Errno> {
    u32::try_from(answer).map_err(|_| Errno::INVAL)
}
