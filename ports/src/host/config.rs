//! Configuration of vifs by the driver domain and by the toolstack.
#![forbid(unsafe_code)]

use crate::options::NicOptions;
use crate::settings::SharedRates;
use crate::switch::Switches;
use alloc::format;
use alloc::string::String;
use core::net::Ipv4Addr;
use pvio_netback::queue::Policy;
use pvio_xenbus::handshake::vif::ToolstackBack;

/// Configuration of one vif by the driver domain, in addition to the toolstack's.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NicConfig {
    /// Name of the tap if the toolstack gives none (`vifname`). The default is
    /// `vif<domain>.<handle>`, as on Linux.
    pub name: Option<String>,
    /// Bridge that the tap joins if the toolstack gives none (`bridge`).
    pub bridge: Option<String>,
    /// Address of the driver domain on the tap, and its prefix length.
    pub address: Option<(Ipv4Addr, u8)>,
    /// Largest number of queues of a guest. The default is the number of processors, up to
    /// [`QUEUES_DEFAULT`].
    pub max_queues: Option<u32>,
    /// How the guest's pages are accessed.
    pub policy: Policy,
}

impl NicConfig {
    /// Returns the largest number of queues of a guest.
    pub(super) fn queues(&self) -> u32 {
        let processors = || std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        self.max_queues.unwrap_or_else(|| processors().min(QUEUES_DEFAULT))
    }
}

/// Settings that all vifs of a driver domain share.
#[derive(Debug, Default)]
pub struct NicSettings {
    /// Default options of a vif.
    pub defaults: NicOptions,
    /// Shared rates, by name.
    pub shares: SharedRates,
    /// Switches of this process.
    pub switches: Switches,
}

/// Default limit of the number of queues of a guest, as in Linux.
pub const QUEUES_DEFAULT: u32 = 8;

/// Returns the name of the vif's interface in Linux.
pub(super) fn interface_name(vif: &ToolstackBack) -> String {
    format!("vif{}.{}", vif.frontend_id, vif.handle)
}

/// Splits the toolstack's `bridge` into the bridge's name and the options after it: `xl` has one
/// field for both, `bridge=NAME;OPTION;OPTION`.
pub(super) fn bridge_and_options(vif: &ToolstackBack) -> (Option<&str>, &str) {
    let all = vif.bridge.as_deref().unwrap_or_default();
    let (bridge, options) = all.split_once(';').unwrap_or((all, ""));
    (Some(bridge).filter(|name| !name.is_empty()), options)
}
