//! Options of NICs that several commands have.

use crate::failure::Failure;
use clap::Args;
use pvio_ports::host::NicSettings;
use pvio_ports::options::{NicOptions, shared_rate};
use pvio_ports::tap::TapConfig;
use pvio_ports::wrappers::shape::SharedRate;

/// Options of NICs.
#[derive(Debug, Clone, Default, Args)]
pub struct NicArgs {
    /// Default options of NICs, separated by commas, such as guard=ip,tx=10M (see docs/nics.md)
    #[arg(long = "nic-options", value_name = "OPTIONS", default_value = "")]
    pub options: String,
    /// A rate limit that NICs may share (share=NAME), in bytes per second in each direction
    #[arg(long = "nic-share", value_name = "NAME=RATE")]
    pub shares: Vec<String>,
    /// A tap as the uplink of a switch that NICs are connected to (switch=NAME), on a bridge or on
    /// none
    #[arg(long = "nic-uplink", value_name = "SWITCH=TAP[@BRIDGE]")]
    pub uplinks: Vec<String>,
}

impl NicArgs {
    /// Returns the settings that the options describe.
    ///
    /// # Errors
    /// An option or value is not valid.
    pub fn settings(&self) -> Result<NicSettings, Failure> {
        let defaults = NicOptions::default().and(&self.options);
        let defaults = defaults.map_err(|e| Failure::of(e).as_input())?;
        let mut settings = NicSettings { defaults, ..NicSettings::default() };
        for share in &self.shares {
            let (name, rate) = share.split_once('=').unwrap_or((share, ""));
            let rate = shared_rate(rate).map_err(|expected| {
                let what = format!("invalid value {share:?} of --nic-share: expected {expected}");
                Failure::input(what, "write it as in uplink=125M")
            })?;
            settings.shares.insert(name.to_owned(), SharedRate::new(rate));
        }
        for uplink in &self.uplinks {
            let (switch, tap) = uplink
                .split_once('=')
                .filter(|(s, t)| !s.is_empty() && !t.is_empty())
                .ok_or_else(|| {
                    let what = format!("invalid value {uplink:?} of --nic-uplink");
                    Failure::input(what, "write it as in lan=pvio-lan@xenbr0")
                })?;
            let (tap, bridge) = tap.split_once('@').map_or((tap, None), |(t, b)| (t, Some(b)));
            let mut config = TapConfig::new(tap);
            config.bridge = bridge.map(str::to_owned);
            settings.switches.set_uplink(switch, config);
        }
        Ok(settings)
    }
}
