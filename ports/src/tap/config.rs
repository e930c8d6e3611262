//! Configuration of a tap, and the reasons why it cannot be created.
#![forbid(unsafe_code)]

use alloc::borrow::Cow;
use alloc::format;
use alloc::string::String;
use core::net::Ipv4Addr;
use pvio_ring::error::Remedy;
use pvio_xenbus::driver::Fault;
use rustix::io::Errno;

/// MAC address that Linux gives the host's side of every vif, so that a bridge never takes its own
/// address from it.
pub const HOST_MAC: [u8; 6] = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff];

pub(super) const DEVICE: &str = "/dev/net/tun";

/// Configuration of a tap.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TapConfig {
    /// Name of the interface, 1 to 15 bytes.
    pub name: String,
    /// MAC address of the host's side. Not the guest's.
    pub mac: [u8; 6],
    /// Size of the largest packet in bytes, without the Ethernet header.
    pub mtu: u32,
    /// Name of the network namespace (`ip netns`).
    pub netns: Option<String>,
    /// Bridge to join, of the kernel or of Open vSwitch.
    pub bridge: Option<String>,
    /// Address of the host on this link, and its prefix length.
    pub address: Option<(Ipv4Addr, u8)>,
    /// Whether to bring it up; a hotplug script does that itself.
    pub up: bool,
    /// Number of packets that each queue holds for its reader; the kernel drops further packets. A
    /// packet may have 64 KiB, so this also bounds the memory that a guest that does not receive
    /// can occupy for some seconds.
    pub queue_len: u32,
    /// Whether it supports several queues.
    pub multi_queue: bool,
}

impl TapConfig {
    /// Returns the configuration of a tap of that name with the defaults of Linux for a vif:
    /// [`HOST_MAC`], MTU 1500, no bridge, no address, one queue.
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

/// Reason why a tap could not be created, with a remedy.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TapError {
    /// The tap driver is missing.
    #[error("a tap cannot be created: {DEVICE} is missing")]
    NoDriver,
    /// A capability is missing.
    #[error("cannot {0}: permission denied")]
    NotPermitted(&'static str),
    /// An interface of that name exists.
    #[error("the tap {0} cannot be created: an interface of that name exists")]
    NameInUse(String),
    /// Not a valid interface name.
    #[error("invalid interface name {0:?}")]
    BadName(String),
    /// The bridge does not exist.
    #[error("the tap cannot join the bridge {0}: it does not exist")]
    NoBridge(String),
    /// The interface is not a bridge.
    #[error("the tap cannot join the bridge {0}: it is not a bridge, or does not accept taps")]
    NotABridge(String),
    /// The interface to open is not a tap, or not of the required kind.
    #[error("{0} cannot be used: it is not a tap of the required kind")]
    NotATap(String),
    /// The namespace cannot be entered.
    #[error("the network namespace {name} cannot be entered")]
    NoNamespace {
        /// Name of the namespace.
        name: String,
        /// Error of the system.
        #[source]
        errno: Errno,
    },
    /// Open vSwitch rejects the tap.
    #[error("Open vSwitch rejects the tap: {0}")]
    OpenVswitch(String),
    /// The uplink of a switch cannot be started.
    #[error("the switch's uplink cannot start: {0}")]
    NoUplink(String),
    /// The driver lacks a feature.
    #[error("the tap driver does not support: {0}")]
    Unsupported(&'static str),
    /// Another system error.
    #[error("cannot {what}")]
    System {
        /// Operation that failed.
        what: &'static str,
        /// Error of the system.
        #[source]
        errno: Errno,
    },
}

impl Remedy for TapError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        Some(match self {
            Self::NoDriver => format!(
                "load the driver (modprobe tun), or create the node (mknod {DEVICE} c 10 200)"
            )
            .into(),
            Self::NotPermitted(_) => {
                format!("run with CAP_NET_ADMIN, and with access to {DEVICE}").into()
            }
            Self::NameInUse(_) => "choose another name, or remove that interface".into(),
            Self::BadName(_) => {
                "use 1 to 15 printable ASCII characters without '/', ':', '%' and space".into()
            }
            Self::NoBridge(name) => {
                format!("create it first (ip link add {name} type bridge)").into()
            }
            Self::NotABridge(_) => "name a bridge; a bridge of Open vSwitch needs ovs-vsctl (apt \
                                    install openvswitch-switch)"
                .into(),
            Self::NotATap(name) => format!(
                "create it with mode tap, and with multi_queue for several queues (ip tuntap add dev \
                 {name} mode tap multi_queue), or use --queues 1"
            )
            .into(),
            Self::NoNamespace { name, .. } => {
                format!("create it first (ip netns add {name})").into()
            }
            Self::OpenVswitch(_) => "check the bridge with ovs-vsctl show".into(),
            Self::NoUplink(_) => "check --nic-uplink, and the permission to create a tap".into(),
            Self::Unsupported(_) => "use a newer kernel".into(),
            Self::System { .. } => return None,
        })
    }
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

impl From<TapError> for Fault {
    fn from(error: TapError) -> Self {
        Self::of(error.code(), &error)
    }
}

#[cfg(test)]
mod remedy_tests {
    use super::*;
    use crate::afxdp::AfXdpError;
    use crate::options::NicOptions;
    use crate::worker::WorkerError;
    use pvio_ring::error::without_remedy;

    #[test]
    fn errors_have_a_remedy_or_are_listed() {
        let (name, errno) = (|| String::from("x"), Errno::NOENT);
        let taps = without_remedy(&[
            &TapError::NoDriver,
            &TapError::NotPermitted("x"),
            &TapError::NameInUse(name()),
            &TapError::BadName(name()),
            &TapError::NoBridge(name()),
            &TapError::NotABridge(name()),
            &TapError::NotATap(name()),
            &TapError::NoNamespace { name: name(), errno },
            &TapError::OpenVswitch(name()),
            &TapError::NoUplink(name()),
            &TapError::Unsupported("x"),
            &TapError::System { what: "x", errno },
        ]);
        assert_eq!(taps, ["System"]);
        let interfaces = without_remedy(&[
            &AfXdpError::NoInterface(name()),
            &AfXdpError::Namespace(TapError::NoDriver),
            &AfXdpError::NotPermitted("x"),
            &AfXdpError::Unsupported("x"),
            &AfXdpError::InUse("x"),
            &AfXdpError::System { what: "x", error: errno.into() },
        ]);
        assert_eq!(interfaces, ["System"]);
        let option = NicOptions::default().and("guard=x").unwrap_err();
        let others = [&WorkerError::Tap(name()) as &dyn Remedy, &WorkerError::Panicked, &option];
        assert!(without_remedy(&others).is_empty());
    }
}
