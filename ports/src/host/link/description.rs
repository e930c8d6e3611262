//! Links that another process opened.
#![forbid(unsafe_code)]

use crate::afxdp::InterfacePlace;
use alloc::string::String;

/// What a process needs to know of an open link besides its descriptors.
///
/// | link | descriptors, in order | what stays with the process that opened it |
/// |---|---|---|
/// | tap | each queue | creation, name, MTU, addresses, bridge, namespace |
/// | `loopback` | none | nothing |
/// | `record`, `replay` | the file to write, the file to read | opening them |
/// | `afxdp` | its BPF link and map, a new socket for each queue | loading the program, creating sockets, changing the map, namespace |
/// | `switch` | cannot be moved | its members share memory of one process |
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum LinkDescription {
    /// A tap.
    Tap {
        /// Size of the largest packet in bytes, without the Ethernet header.
        mtu: u32,
        /// Number of queues that were opened, used or not.
        queues: usize,
    },
    /// Loopback to the guest.
    Loopback,
    /// Files.
    Files {
        /// Name of the vif in the recording.
        interface: String,
        /// Whether there is a file to which the guest's packets are written.
        record: bool,
        /// Name of the file whose packets are sent to the guest, for messages.
        replay: Option<String>,
    },
    /// Queues of a network interface, by AF_XDP.
    AfXdp {
        /// The interface.
        place: InterfacePlace,
        /// Number of its queues that are usable.
        queues: u32,
        /// Whether there is a socket for each queue, which is not bound.
        sockets: bool,
    },
}

impl LinkDescription {
    /// Returns the number of descriptors.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        match self {
            Self::Tap { queues, .. } => *queues,
            Self::Loopback => 0,
            Self::AfXdp { queues, sockets, .. } => {
                let sockets = if *sockets { *queues } else { 0 };
                usize::try_from(sockets).unwrap_or(usize::MAX).saturating_add(2)
            }
            Self::Files { record, replay, .. } => {
                usize::from(*record).saturating_add(usize::from(replay.is_some()))
            }
        }
    }
}
