//! A NIC in a process of its own.
//!
//! | module | contents |
//! |---|---|
//! | `remote` | [`RemoteNic`]: the supervisor's side; opens the link and starts the process |
//! | `capture` | the capture of its packets |
//! | `plan` | what a process of a session is started with |
//! | `process` | the process |

mod capture;
mod plan;
mod process;
mod remote;

pub use capture::{ActiveCapture, CapturePoint};
pub use plan::NicPlan;
pub use process::serve;
pub use remote::RemoteNic;

use super::confine::Confined;
use super::messages::Start;
use pvio_netback::session::SessionSpec;
use pvio_ports::host::LinkDescription;
use pvio_ports::settings::WrapperSettings;
use pvio_xenbus::handshake::vif::VifRate;
use serde::{Deserialize, Serialize};

/// What a session is started with, besides descriptors. `D` describes the platform's descriptors.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NicServe<D> {
    /// How it begins.
    pub start: Start,
    /// The session.
    pub spec: SessionSpec,
    /// The link, whose descriptors are beside this.
    pub link: LinkDescription,
    /// The settings of the wrappers.
    pub settings: WrapperSettings,
    /// The platform.
    pub platform: D,
    /// The confinement.
    pub confined: Confined,
}

/// A change of a session's settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum NicChange {
    /// Other settings of the wrappers.
    Settings(Box<WrapperSettings>),
    /// Another limit of the guest's transmit rate.
    Rate(Option<VifRate>),
    /// Whether the guest receives only the multicast groups that it selected.
    FilterGroups(bool),
    /// Another headroom before each frame to the guest, in bytes.
    Headroom(u16),
    /// Send up to this number of bytes of each packet to the socket beside this, until its other end
    /// is shut down.
    Capture(usize),
}

/// What identifies a session, and what a supervisor needs that did not start it. The descriptors of
/// the counters and of the link are beside it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NicIdentity {
    /// The session.
    pub spec: SessionSpec,
    /// The link, as another process can use it.
    pub link: LinkDescription,
    /// The settings with which the link was opened.
    pub settings: WrapperSettings,
}

impl NicIdentity {
    /// Returns whether this is a session, but for what may change while it is served.
    #[must_use]
    pub fn serves(&self, spec: &SessionSpec) -> bool {
        let mut own = self.spec.clone();
        own.headroom = spec.headroom;
        own.rate = spec.rate;
        own.filter_groups = spec.filter_groups;
        own == *spec
    }
}

/// The hidden command that runs the process of a NIC, after the name of the platform.
pub const COMMAND: &str = "nic";
