//! Options of NICs that several commands take.

use crate::failure::Failure;
use clap::Args;
use pvio_ports::host::NicSettings;
use pvio_ports::options::{NicOptions, shared_rate};
use pvio_ports::shape::SharedRate;
use pvio_ports::tap::TapConfig;

/// What holds for NICs.
#[derive(Debug, Clone, Default, Args)]
pub struct NicArgs {
    /// What holds for a NIC of which nothing else is said, words with commas between: guard=ip,tx=10M
    /// (docs/nics.md has all)
    #[arg(long = "nic-options", value_name = "WORDS", default_value = "")]
    pub options: String,
    /// A rate that NICs may share (share=NAME): bytes a second, each way
    #[arg(long = "nic-share", value_name = "NAME=RATE")]
    pub shares: Vec<String>,
    /// A tap as the way out of a switch that NICs are plugged into (switch=NAME), on a bridge or
    /// on none
    #[arg(long = "nic-uplink", value_name = "SWITCH=TAP[@BRIDGE]")]
    pub uplinks: Vec<String>,
}

impl NicArgs {
    /// What they come to.
    ///
    /// # Errors
    /// A word that is none.
    pub fn site(&self) -> Result<NicSettings, Failure> {
        let defaults = NicOptions::default().and(&self.options);
        let defaults = defaults.map_err(|e| Failure::input(e, "docs/nics.md has them all"))?;
        let mut site = NicSettings { defaults, ..NicSettings::default() };
        for share in &self.shares {
            let (name, rate) = share.split_once('=').unwrap_or((share, ""));
            let rate = shared_rate(rate).map_err(|expected| {
                Failure::input(format!("--nic-share {share}: {expected}"), "as in uplink=125M")
            })?;
            site.shares.insert(name.to_owned(), SharedRate::new(rate));
        }
        for uplink in &self.uplinks {
            let (switch, tap) = uplink
                .split_once('=')
                .filter(|(s, t)| !s.is_empty() && !t.is_empty())
                .ok_or_else(|| {
                    Failure::input(format!("--nic-uplink {uplink}"), "as in lan=pvio-lan@xenbr0")
                })?;
            let (tap, bridge) = tap.split_once('@').map_or((tap, None), |(t, b)| (t, Some(b)));
            let mut config = TapConfig::new(tap);
            config.bridge = bridge.map(str::to_owned);
            site.switches.set_uplink(switch, config);
        }
        Ok(site)
    }
}
