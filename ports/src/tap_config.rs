//! What a tap is to be, and why it could not be made so.
#![forbid(unsafe_code)]

use alloc::string::String;
use core::net::Ipv4Addr;
use rustix::io::Errno;

/// What Linux gives the host's side of every vif, so that a bridge never takes its own address
/// from one.
pub const HOST_MAC: [u8; 6] = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff];

pub(super) const DEVICE: &str = "/dev/net/tun";

/// What a tap is to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TapConfig {
    /// The interface's name, 1 to 15 bytes.
    pub name: String,
    /// The address of the host's side. Not the guest's.
    pub mac: [u8; 6],
    /// Bytes of the largest packet, without the Ethernet header.
    pub mtu: u32,
    /// The network namespace to be in, by its name (`ip netns`).
    pub netns: Option<String>,
    /// The bridge to join, the kernel's or Open vSwitch's.
    pub bridge: Option<String>,
    /// An address of the host on this link, and its prefix length.
    pub address: Option<(Ipv4Addr, u8)>,
    /// Whether to bring it up; a hotplug script wants to do that itself.
    pub up: bool,
    /// Packets that each queue holds for its reader; the kernel drops what comes then. As they may
    /// be of 64 KiB, this is also how much memory a guest that does not receive can hold for some
    /// seconds.
    pub queue_len: u32,
    /// Whether it is to have several queues.
    pub multi_queue: bool,
}

impl TapConfig {
    /// A tap of that name, as Linux makes a vif: [`HOST_MAC`], MTU 1500, on no bridge, without
    /// address, with one queue.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            mac: HOST_MAC,
            mtu: 1500,
            netns: None,
            bridge: None,
            address: None,
            up: true,
            queue_len: 256,
            multi_queue: false,
        }
    }
}

/// Why a tap could not be made, and what to do about it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TapError {
    /// There is no tap driver.
    #[error(
        "{DEVICE} is missing: load the driver (modprobe tun), or make the node (mknod {DEVICE} c 10 200)"
    )]
    NoDriver,
    /// Not allowed.
    #[error("not permitted to {0}: CAP_NET_ADMIN is needed (and access to {DEVICE})")]
    NotPermitted(&'static str),
    /// There is an interface of that name.
    #[error("an interface named {0} exists already: choose another name or remove it")]
    NameInUse(String),
    /// Not a name an interface can have.
    #[error(
        "{0:?} cannot be an interface's name: 1 to 15 printable ASCII characters, no '/', ':', '%' or space"
    )]
    BadName(String),
    /// There is no such bridge.
    #[error("there is no bridge named {0}: make it first (ip link add {0} type bridge)")]
    NoBridge(String),
    /// That interface is no bridge.
    #[error(
        "{0} is not a bridge, or the tap cannot join it (a bridge of Open vSwitch's takes ovs-vsctl: apt install openvswitch-switch)"
    )]
    NotABridge(String),
    /// What is to be opened is no tap, or one of another kind.
    #[error(
        "{0} is not a tap that can be used: it takes mode tap, and multi_queue where there are to be several (ip tuntap add dev {0} mode tap multi_queue); --queues 1 where not"
    )]
    NotATap(String),
    /// The namespace cannot be entered.
    #[error("no network namespace {name}: {errno}; make it first (ip netns add {name})")]
    NoNamespace {
        /// Its name.
        name: String,
        /// What the system said.
        errno: Errno,
    },
    /// An Open vSwitch does not take it.
    #[error("Open vSwitch does not take the tap: {0}")]
    OpenVswitch(String),
    /// A switch has no way out.
    #[error("the switch's uplink cannot start: {0}")]
    NoUplink(String),
    /// The driver is too old.
    #[error("the tap driver knows no {0}")]
    Unsupported(&'static str),
    /// Anything else.
    #[error("cannot {what}: {errno}")]
    System {
        /// What was being done.
        what: &'static str,
        /// What the system said.
        errno: Errno,
    },
}

impl TapError {
    /// A short stable code for logs, counters and `error` nodes.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NoDriver => "tap-no-driver",
            Self::NotPermitted(_) => "tap-not-permitted",
            Self::NameInUse(_) => "tap-name-in-use",
            Self::BadName(_) => "tap-bad-name",
            Self::NoBridge(_) => "tap-no-bridge",
            Self::NotABridge(_) => "tap-not-a-bridge",
            Self::NotATap(_) => "tap-not-a-tap",
            Self::NoNamespace { .. } => "tap-no-namespace",
            Self::OpenVswitch(_) => "tap-open-vswitch",
            Self::NoUplink(_) => "switch-no-uplink",
            Self::Unsupported(_) => "tap-unsupported",
            Self::System { .. } => "tap-system",
        }
    }
}
