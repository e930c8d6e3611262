//! A tap: a network interface of the kernel whose packets this process reads and writes
//! (`linux/if_tun.h`).
//!
//! The kernel removes the interface when its last [`Tap`] handle is closed, also if the process is
//! killed.
//! A [`TapPort`](super::TapPort) moves packets through it.
#![allow(unsafe_code)]

use super::config::{DEVICE, TapConfig, TapError};
use super::open_vswitch;
use alloc::string::String;
use bytemuck::{AnyBitPattern, NoUninit, Pod, Zeroable};
use core::fmt;
use core::net::Ipv4Addr;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{IntegerSetter, Opcode, Setter, Updater, ioctl};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use std::os::fd::{AsFd, OwnedFd};

/// Size of the header before each packet in bytes (`struct virtio_net_hdr`).
pub const VNET_HEADER: usize = 10;

/// Size of an interface's name in bytes, including the terminator (`IFNAMSIZ`).
const NAME_SIZE: usize = 16;

/// Handle on a queue of a tap.
pub struct Tap {
    file: OwnedFd,
    name: String,
    mtu: u32,
}

impl Tap {
    /// Creates the interface, configures it by `config` and brings it up. Nothing remains if a step
    /// fails.
    ///
    /// Packets to and from it may have blank checksums. Packets from it are segmented until
    /// [`set_unsegmented`](Self::set_unsegmented).
    ///
    /// # Errors
    /// A [`TapError`].
    pub fn create(config: &TapConfig) -> Result<Self, TapError> {
        check_name(&config.name)?;
        let file = open()?;
        let flags = if config.multi_queue { IFF_MULTI_QUEUE } else { 0 };
        attach(&file, &config.name, flags | IFF_TUN_EXCL)?;
        let tap = Self { file, name: config.name.clone(), mtu: config.mtu };
        tap.set_header()?;
        let kernel = Kernel::open()?;
        kernel.set_mac(&config.name, config.mac)?;
        kernel.set_mtu(&config.name, config.mtu)?;
        match kernel.set_queue_len(&config.name, config.queue_len) {
            // Only a process that is privileged in the initial user namespace may.
            Err(TapError::NotPermitted(_)) => {
                tracing::info!(
                    tap = config.name,
                    "the length of the tap's queue cannot be set: it keeps the kernel's default"
                );
            }
            other => other?,
        }
        if let Some(bridge) = &config.bridge {
            match kernel.join(&config.name, bridge) {
                Err(TapError::NotABridge(_)) => open_vswitch::join(&config.name, bridge)?,
                other => other?,
            }
        }
        if let Some((address, prefix)) = config.address {
            kernel.set_address(&config.name, address, prefix)?;
        }
        if config.up {
            kernel.bring_up(&config.name)?;
        }
        Ok(tap)
    }

    /// Opens an existing interface (`ip tuntap add dev NAME mode tap`) without a change of its
    /// configuration: the owner sets address, MTU, bridge and link state.
    ///
    /// # Errors
    /// A [`TapError`]; [`TapError::NotATap`] if there is none of that name, or if its multi-queue
    /// flag differs from `multi_queue`.
    pub fn open(name: &str, multi_queue: bool) -> Result<Self, TapError> {
        check_name(name)?;
        let not_a_tap = || TapError::NotATap(name.into());
        let mtu = Kernel::open()?.mtu(name).map_err(|_| not_a_tap())?;
        let file = open()?;
        let flags = if multi_queue { IFF_MULTI_QUEUE } else { 0 };
        attach(&file, name, flags).map_err(|error| match error {
            TapError::Unsupported(_) => not_a_tap(),
            other => other,
        })?;
        let tap = Self { file, name: name.into(), mtu };
        tap.set_header()?;
        Ok(tap)
    }

    /// Returns a handle for a descriptor that another process opened and attached, with a packet
    /// header (`IFF_VNET_HDR`) and without packet information (`IFF_NO_PI`), in this network
    /// namespace.
    ///
    /// # Errors
    /// [`TapError::NotATap`] if the descriptor is not such a tap.
    pub fn from_fd(file: OwnedFd) -> Result<Self, TapError> {
        let tap = Self::from_opened(file, 0)?;
        let flags = rustix::fs::fcntl_getfl(&tap.file).map_err(|e| refused("look at a tap", e))?;
        let flags = flags | OFlags::NONBLOCK;
        rustix::fs::fcntl_setfl(&tap.file, flags).map_err(|e| refused("set up a tap", e))?;
        let tap = Self { mtu: Kernel::open()?.mtu(&tap.name)?, ..tap };
        tap.set_header()?;
        Ok(tap)
    }

    /// Returns a handle for a descriptor that [`create`](Self::create), [`open`](Self::open) or
    /// [`add_queue`](Self::add_queue) opened in another process, of an interface with this MTU. It
    /// opens nothing, and needs no capability.
    ///
    /// # Errors
    /// [`TapError::NotATap`] if the descriptor is not such a tap.
    pub fn from_opened(file: OwnedFd, mtu: u32) -> Result<Self, TapError> {
        let not_a_tap = |name: &str| TapError::NotATap(name.into());
        let request = identity(&file).map_err(|_| not_a_tap("the descriptor"))?;
        let name = request.name();
        if request.value::<u16>() & KIND != KIND {
            return Err(not_a_tap(&name));
        }
        Ok(Self { file, name, mtu })
    }

    /// Returns the interface's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the size of the largest packet in bytes, without the Ethernet header.
    #[must_use]
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    /// Adds a queue to the interface, which must have been created with
    /// [several](TapConfig::multi_queue), and returns its handle. The queue is in use until that is
    /// [changed](Self::set_in_use), and is removed with its handle.
    ///
    /// # Errors
    /// A [`TapError`]; the kernel supports at most 256 queues.
    pub fn add_queue(&self) -> Result<Self, TapError> {
        let file = open()?;
        attach(&file, &self.name, IFF_MULTI_QUEUE)?;
        Ok(Self { file, name: self.name.clone(), mtu: self.mtu })
    }

    /// Sets whether the kernel uses this queue. A queue that is not in use drops its packets, and
    /// neither receives nor sends any.
    ///
    /// # Errors
    /// [`TapError::System`] if the state does not change, or the interface has a single queue.
    pub fn set_in_use(&self, in_use: bool) -> Result<(), TapError> {
        const TUNSETQUEUE: Opcode = 0x4004_54d9;
        const IFF_ATTACH_QUEUE: u16 = 0x0200;
        let flags = if in_use { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
        let mut request = IfReq::with("", flags);
        // SAFETY: the request reads a `struct ifreq`.
        let set = unsafe { Updater::<TUNSETQUEUE, IfReq>::new(&mut request) };
        run(&self.file, set).map_err(|errno| refused("use a queue of the tap, or not", errno))
    }

    /// Whether the kernel uses this queue.
    ///
    /// # Errors
    /// [`TapError::System`].
    pub fn is_in_use(&self) -> Result<bool, TapError> {
        let found = identity(&self.file).map_err(|e| refused("look at a queue of the tap", e))?;
        Ok(found.value::<u16>() & IFF_DETACH_QUEUE == 0)
    }

    /// Returns another handle for the same queue.
    ///
    /// # Errors
    /// [`TapError::System`] if no descriptor is available.
    pub fn try_clone(&self) -> Result<Self, TapError> {
        let file = rustix::io::fcntl_dupfd_cloexec(&self.file, 0);
        let file = file.map_err(|errno| refused("duplicate the tap's descriptor", errno))?;
        Ok(Self { file, name: self.name.clone(), mtu: self.mtu })
    }

    /// Sets which packets the kernel may pass unsegmented; it segments all others itself. (It
    /// accepts all kinds from this process.)
    ///
    /// TCP with ECN's congestion mark and UDP are not enabled (`TUN_F_TSO_ECN`, `TUN_F_USO4`): a
    /// vif cannot describe such packets, and the guest would repeat the mark in every segment.
    ///
    /// # Errors
    /// [`TapError::Unsupported`].
    pub fn set_unsegmented(&self, tcp_v4: bool, tcp_v6: bool) -> Result<(), TapError> {
        const TUNSETOFFLOAD: Opcode = 0x4004_54d0;
        const TUN_F_CSUM: usize = 1;
        const TUN_F_TSO4: usize = 2;
        const TUN_F_TSO6: usize = 4;
        let tso4 = if tcp_v4 { TUN_F_TSO4 } else { 0 };
        let tso6 = if tcp_v6 { TUN_F_TSO6 } else { 0 };
        // SAFETY: the request takes its flags by value.
        let set = unsafe { IntegerSetter::<TUNSETOFFLOAD>::new_usize(TUN_F_CSUM | tso4 | tso6) };
        run(&self.file, set).map_err(|_| TapError::Unsupported("checksum or TCP offload"))
    }

    /// Sets the carrier, which is on while a guest is connected; without it, the kernel sends
    /// nothing.
    ///
    /// # Errors
    /// [`TapError::System`].
    pub fn set_carrier(&self, on: bool) -> Result<(), TapError> {
        const TUNSETCARRIER: Opcode = 0x4004_54e2;
        // SAFETY: the request reads an `int`.
        let set = unsafe { Setter::<TUNSETCARRIER, i32>::new(i32::from(on)) };
        run(&self.file, set).map_err(|errno| refused("set the tap's carrier", errno))
    }

    /// Returns the descriptor, by which packets are read and written, each with a header of
    /// [`VNET_HEADER`] bytes.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.file
    }

    /// Enables the header before each packet, and blank checksums in both directions.
    fn set_header(&self) -> Result<(), TapError> {
        self.set_header_size(VNET_HEADER)?;
        self.set_unsegmented(false, false)
    }

    /// Sets the header's size for all queues of the interface.
    pub(super) fn set_header_size(&self, size: usize) -> Result<(), TapError> {
        const TUNSETVNETHDRSZ: Opcode = 0x4004_54d8;
        // SAFETY: the request reads an `int`.
        let size = unsafe { Setter::<TUNSETVNETHDRSZ, i32>::new(size as i32) };
        run(&self.file, size).map_err(|_| TapError::Unsupported("packet header"))
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl fmt::Debug for Tap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tap").field(&self.name).finish()
    }
}

/// `struct ifreq`: a name, and 24 bytes whose meaning depends on the request.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct IfReq {
    name: [u8; NAME_SIZE],
    data: [u8; 24],
}

impl IfReq {
    fn new(name: &str) -> Self {
        let mut request = Self { name: [0; NAME_SIZE], data: [0; 24] };
        // Names are checked before; a longer one is truncated before the terminator.
        for (to, from) in request.name.iter_mut().take(NAME_SIZE - 1).zip(name.bytes()) {
            *to = from;
        }
        request
    }

    /// Returns the name up to the terminator.
    fn name(&self) -> String {
        let name = self.name.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    }

    /// Returns a request whose data begin with `data`; the rest is 0.
    fn with<T: NoUninit>(name: &str, data: T) -> Self {
        let mut request = Self::new(name);
        let bytes = bytemuck::bytes_of(&data);
        request.data.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        request
    }

    /// Returns the value at the beginning of the data.
    fn value<T: AnyBitPattern>(&self) -> T {
        const { assert!(size_of::<T>() <= 24, "the value is part of the data") };
        let (value, _) = self.data.split_at(size_of::<T>());
        bytemuck::pod_read_unaligned(value)
    }
}

/// `struct sockaddr` with an Ethernet address.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct HardwareAddress {
    family: u16,
    address: [u8; 6],
}

/// `struct sockaddr_in`, without its padding.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct SocketAddress {
    family: u16,
    port: u16,
    address: [u8; 4],
}

const IFF_TAP: u16 = 2;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_DETACH_QUEUE: u16 = 0x0400;
/// Flags of every tap of this crate.
const KIND: u16 = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
/// The request fails if the interface exists.
const IFF_TUN_EXCL: u16 = 0x8000;

fn open() -> Result<OwnedFd, TapError> {
    // io_uring reads and writes a file inline only if the file is non-blocking. Otherwise each
    // operation is passed to a kernel worker thread.
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = rustix::fs::open(DEVICE, flags, Mode::empty());
    file.map_err(|errno| match errno {
        Errno::NOENT | Errno::NXIO | Errno::NODEV => TapError::NoDriver,
        other => refused("open the tap driver", other),
    })
}

/// Creates the interface, or another queue of it.
fn attach(file: &OwnedFd, name: &str, flags: u16) -> Result<(), TapError> {
    const TUNSETIFF: Opcode = 0x4004_54ca;
    let exclusive = flags & IFF_TUN_EXCL != 0;
    let flags = KIND | flags;
    let mut request = IfReq::with(name, flags);
    // SAFETY: the request reads and writes a `struct ifreq`.
    let attach = unsafe { Updater::<TUNSETIFF, IfReq>::new(&mut request) };
    run(file, attach).map_err(|errno| match errno {
        Errno::BUSY | Errno::EXIST if exclusive => TapError::NameInUse(name.into()),
        // The existing interface of that name may not be a tap.
        Errno::INVAL if exclusive && Kernel::open().is_ok_and(|k| k.index(name).is_ok()) => {
            TapError::NameInUse(name.into())
        }
        Errno::INVAL => TapError::Unsupported("tap with a packet header"),
        other => refused("make a tap", other),
    })
}

/// Returns the name of a descriptor's interface and the flags of its queue.
fn identity(file: &OwnedFd) -> Result<IfReq, Errno> {
    const TUNGETIFF: Opcode = 0x8004_54d2;
    let mut request = IfReq::new("");
    // SAFETY: the request writes a `struct ifreq`.
    let get = unsafe { Updater::<TUNGETIFF, IfReq>::new(&mut request) };
    run(file, get)?;
    Ok(request)
}

/// Socket for the configuration of interfaces.
struct Kernel(OwnedFd);

impl Kernel {
    fn open() -> Result<Self, TapError> {
        let kind = (AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC);
        let socket = socket_with(kind.0, kind.1, kind.2, None);
        socket.map(Self).map_err(|errno| refused("open a socket", errno))
    }

    fn set_mac(&self, name: &str, mac: [u8; 6]) -> Result<(), TapError> {
        const SIOCSIFHWADDR: Opcode = 0x8924;
        const ARPHRD_ETHER: u16 = 1;
        let data = HardwareAddress { family: ARPHRD_ETHER, address: mac };
        self.request::<SIOCSIFHWADDR>("set the tap's MAC address", IfReq::with(name, data))?;
        Ok(())
    }

    fn set_mtu(&self, name: &str, mtu: u32) -> Result<(), TapError> {
        const SIOCSIFMTU: Opcode = 0x8922;
        let request = IfReq::with(name, mtu);
        self.request::<SIOCSIFMTU>("set the tap's MTU", request)?;
        Ok(())
    }

    fn mtu(&self, name: &str) -> Result<u32, TapError> {
        const SIOCGIFMTU: Opcode = 0x8921;
        let found = self.request::<SIOCGIFMTU>("look at an interface", IfReq::new(name))?;
        Ok(found.value())
    }

    fn set_queue_len(&self, name: &str, packets: u32) -> Result<(), TapError> {
        const SIOCSIFTXQLEN: Opcode = 0x8943;
        let request = IfReq::with(name, packets);
        self.request::<SIOCSIFTXQLEN>("set the length of the tap's queues", request)?;
        Ok(())
    }

    fn join(&self, name: &str, bridge: &str) -> Result<(), TapError> {
        const SIOCBRADDIF: Opcode = 0x89a2;
        let no_bridge = || TapError::NoBridge(bridge.into());
        check_name(bridge).map_err(|_| no_bridge())?;
        self.index(bridge).map_err(|_| no_bridge())?;
        let request = IfReq::with(bridge, self.index(name)?);
        self.request::<SIOCBRADDIF>("join a bridge", request).map_err(|error| match error {
            TapError::System { errno: Errno::OPNOTSUPP | Errno::INVAL, .. } => {
                TapError::NotABridge(bridge.into())
            }
            other => other,
        })?;
        Ok(())
    }

    /// Returns the index of an interface.
    fn index(&self, name: &str) -> Result<i32, TapError> {
        const SIOCGIFINDEX: Opcode = 0x8933;
        let found = self.request::<SIOCGIFINDEX>("find an interface", IfReq::new(name))?;
        Ok(found.value())
    }

    fn set_address(&self, name: &str, address: Ipv4Addr, prefix: u8) -> Result<(), TapError> {
        const SIOCSIFADDR: Opcode = 0x8916;
        const SIOCSIFNETMASK: Opcode = 0x891c;
        const AF_INET: u16 = 2;
        let what = "give the tap an IPv4 address";
        let host_bits = 32_u32.checked_sub(u32::from(prefix));
        let host_bits = host_bits.ok_or(TapError::System { what, errno: Errno::INVAL })?;
        let mask = u32::MAX.checked_shl(host_bits).unwrap_or(0);
        let sockaddr = |address: [u8; 4]| {
            IfReq::with(name, SocketAddress { family: AF_INET, port: 0, address })
        };
        self.request::<SIOCSIFADDR>(what, sockaddr(address.octets()))?;
        self.request::<SIOCSIFNETMASK>(what, sockaddr(mask.to_be_bytes()))?;
        Ok(())
    }

    fn bring_up(&self, name: &str) -> Result<(), TapError> {
        const SIOCGIFFLAGS: Opcode = 0x8913;
        const SIOCSIFFLAGS: Opcode = 0x8914;
        const IFF_UP: u16 = 1;
        let what = "bring the tap up";
        let flags: u16 = self.request::<SIOCGIFFLAGS>(what, IfReq::new(name))?.value();
        let flags = flags | IFF_UP;
        self.request::<SIOCSIFFLAGS>(what, IfReq::with(name, flags))?;
        Ok(())
    }

    /// Executes one of the requests above, all of which read and write a `struct ifreq`.
    fn request<const OPCODE: Opcode>(
        &self,
        what: &'static str,
        mut request: IfReq,
    ) -> Result<IfReq, TapError> {
        // SAFETY: every opcode this is called with takes a `struct ifreq`.
        let update = unsafe { Updater::<OPCODE, IfReq>::new(&mut request) };
        run(&self.0, update).map_err(|errno| refused(what, errno))?;
        Ok(request)
    }
}

fn run<I: rustix::ioctl::Ioctl>(file: &OwnedFd, request: I) -> Result<I::Output, Errno> {
    // SAFETY: the caller that created the request promised that its opcode matches its argument.
    unsafe { ioctl(file, request) }
}

fn refused(what: &'static str, errno: Errno) -> TapError {
    match errno {
        Errno::PERM | Errno::ACCESS => TapError::NotPermitted(what),
        errno => TapError::System { what, errno },
    }
}

/// Checks that the kernel accepts a name. Names that it would complete itself (`%d`) are rejected.
fn check_name(name: &str) -> Result<(), TapError> {
    let fits = (1..NAME_SIZE).contains(&name.len()) && name != "." && name != "..";
    if fits && name.bytes().all(|b| b.is_ascii_graphic() && !b"/:%".contains(&b)) {
        Ok(())
    } else {
        Err(TapError::BadName(name.into()))
    }
}

#[cfg(test)]
mod tests;
