//! Settings of a vif that can be changed while it runs, and the wrappers that apply them.
#![forbid(unsafe_code)]

use crate::NetPort;
use crate::options::{BadOption, GuardMode, NicOptions};
use crate::wrappers::capture::{Capture, Probe};
use crate::wrappers::faults::{Faults, Plans};
use crate::wrappers::guard::{Guard, Guards, Network, Rules};
use crate::wrappers::shape::{Shape, Shaper, Shapes, SharedRate};
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_netback::stats::Stats;
use pvio_xenbus::driver::Fault;

/// Runtime settings of one vif. Clones refer to the same vif.
#[derive(Clone, Debug, Default)]
pub struct RuntimeSettings {
    /// Capture point of the vif.
    pub probe: Probe,
    guards: Guards,
    shapes: Shapes,
    plans: Plans,
}

/// Settings of the wrappers of one vif: plain values, which may be sent to another process.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct WrapperSettings {
    /// Options of the vif. Those that select its link have no effect here.
    pub options: NicOptions,
    /// MAC address of the vif.
    pub mac: [u8; 6],
    /// IP addresses of the vif (the toolstack's `ip`), separated by spaces or commas.
    pub addresses: Option<String>,
}

/// Port with every wrapper.
pub type Wrapped<N> = Capture<Guard<Shaper<Faults<N>>>>;

/// Shared rates, by name.
pub type SharedRates = BTreeMap<String, Arc<SharedRate>>;

impl RuntimeSettings {
    /// Returns the port of a queue inside all wrappers.
    pub fn wrap<N: NetPort>(&self, port: N, stats: Arc<Stats>, queue: usize) -> Wrapped<N> {
        let faults = self.plans.wrap(port, stats, queue as u64);
        self.probe.wrap(self.guards.wrap(self.shapes.wrap(faults)))
    }

    /// Applies settings.
    ///
    /// # Errors
    /// A [`Fault`]; nothing is changed.
    pub fn apply(&self, settings: &WrapperSettings, shares: &SharedRates) -> Result<(), Fault> {
        let WrapperSettings { options, mac, addresses } = settings;
        let mac = *mac;
        let fault =
            |text: String, remedy: String| Fault::new("nic-options", text).with_remedy(remedy);
        let share = match &options.share {
            None => None,
            Some(name) => Some(shares.get(name).map(Arc::clone).ok_or_else(|| {
                fault(
                    alloc::format!("the shared rate {name} does not exist"),
                    alloc::format!("define it with --nic-share {name}=RATE"),
                )
            })?),
        };
        let rules = match options.guard {
            GuardMode::Off => Rules::default(),
            GuardMode::Mac => Rules { mac: Some(mac), addresses: None },
            GuardMode::Ip => {
                let none = || {
                    let text = "guard=ip cannot be applied: the vif has no addresses";
                    fault(text.into(), "give them with ip=… in the vif's line".into())
                };
                let words = addresses.as_ref().ok_or_else(none)?;
                let words = words.split([' ', ',']).filter(|word| !word.is_empty());
                let parsed = words.map(|word| {
                    let network = word.parse::<Network>();
                    network.map_err(|error| {
                        let text = alloc::format!("invalid address {word:?} of the vif: {error}");
                        fault(text, "check ip=… in the vif's line".into())
                    })
                });
                let all = parsed.collect::<Result<Vec<_>, Fault>>()?;
                Rules { mac: Some(mac), addresses: Some(all) }
            }
        };
        self.guards.set(rules);
        self.plans.set(options.faults);
        self.shapes.set(&Shape { tx: options.tx, rx: options.rx, share });
        Ok(())
    }
}

impl From<BadOption> for Fault {
    fn from(error: BadOption) -> Self {
        Self::of("nic-options", &error)
    }
}
