//! The scenarios of the lab, one table for each family.
//!
//! | module | contents |
//! |---|---|
//! | [`disk`] | disks: data integrity, file systems, flushes, read-only access |
//! | [`nic`] | NICs: all sizes, both directions, with and without offloads |
//! | [`hotplug`] | devices that are attached and detached; drivers that are unbound and bound again |
//! | [`policies`] | how pvio accesses guest pages |
//! | [`frontends`] | hostile frontends |
//! | [`own`] | pvio's frontends with every backend |
//! | [`toolstack`] | a toolstack that writes invalid nodes |
//! | [`beside`] | pvio together with Linux's backends |
//! | [`driver_domain`] | devices served by another guest, which is destroyed |
//! | [`hvm`] | a guest with a device model |
//! | [`matrix`] | disks with many configurations, on each type of storage |
//! | [`kernels`] | guests with older and newer kernels, and firmware |
//! | [`storage`] | the checks of disks, on each type of storage |
//! | [`store`] | the types of storage |
//! | [`life`] | guests that end in various ways while their devices are in use |
//! | [`mod@bench`] | measurements, which are not part of `all` |
//! | [`volumes`] | disks that are resized, that free space, that are booted from |
//! | [`devices`] | disks on devices with polled completions, or with secure discard |
//! | [`migrate`] | guests that are migrated while their devices are in use |
//! | [`survival`] | backends that end, and guests that continue |

mod bench;
mod beside;
mod devices;
mod disk;
mod driver_domain;
mod frontends;
mod hotplug;
mod hvm;
mod kernels;
mod life;
mod matrix;
mod migrate;
mod nic;
mod own;
mod policies;
mod runner;
mod storage;
mod store;
mod survival;
mod toolstack;
mod volumes;

use anyhow::Result;
use serde_json::json;

use crate::dom0::backend::Backend;
use crate::dom0::guest::Kind;
use crate::dom0::lab::Lab;

/// The guest that a scenario uses.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Guests {
    /// The shared guest of its backend and guest type.
    Shared,
    /// It creates its own guests. The shared guest is shut down first, so that resources that are
    /// left can be detected.
    Own,
}

/// A property and the function that checks it.
pub struct Scenario {
    /// Unique name, which begins with the family.
    pub name: &'static str,
    /// The property, on one line.
    pub proves: &'static str,
    /// The backends it runs with.
    pub backends: &'static [Backend],
    /// The guest types it runs with.
    pub kinds: &'static [Kind],
    /// The guest that it uses.
    pub guests: Guests,
    /// Runs the checks; an error says what was observed instead.
    pub run: fn(&mut Lab) -> Result<()>,
}

/// A scenario with a backend and a guest type.
pub struct Case {
    /// The scenario.
    pub scenario: &'static Scenario,
    /// The backend.
    pub backend: Backend,
    /// The guest type.
    pub kind: Kind,
}

/// All backends of disks.
const DISKS: &[Backend] = &[Backend::Pvio, Backend::Linux, Backend::PvioDm, Backend::Qdisk];
/// All backends that serve both disks and NICs.
const NICS: &[Backend] = &[Backend::Pvio, Backend::Linux];
const PVIO: &[Backend] = &[Backend::Pvio];
const PV: &[Kind] = &[Kind::Pv];
const BOTH: &[Kind] = &[Kind::Pv, Kind::Pvh];

/// Returns all cases, ordered so that those that can share a boot, a backend and a guest are
/// consecutive.
fn all() -> Vec<Case> {
    let families = [
        disk::SCENARIOS,
        storage::SCENARIOS,
        nic::SCENARIOS,
        nic::wire::SCENARIOS,
        nic::forward::SCENARIOS,
        nic::pace::SCENARIOS,
        nic::rate::SCENARIOS,
        nic::many::SCENARIOS,
        nic::plugged::SCENARIOS,
        hotplug::SCENARIOS,
        frontends::SCENARIOS,
        own::SCENARIOS,
        life::SCENARIOS,
        migrate::SCENARIOS,
        survival::SCENARIOS,
        policies::SCENARIOS,
        matrix::SCENARIOS,
        volumes::SCENARIOS,
        devices::SCENARIOS,
        toolstack::SCENARIOS,
        beside::SCENARIOS,
        driver_domain::SCENARIOS,
        hvm::SCENARIOS,
        kernels::SCENARIOS,
        bench::SCENARIOS,
    ];
    let mut cases = Vec::new();
    for backend in DISKS {
        for kind in [Kind::Pv, Kind::Pvh, Kind::Hvm] {
            for guests in [Guests::Shared, Guests::Own] {
                let here = families.iter().copied().flatten().filter(|it| {
                    it.backends.contains(backend) && it.kinds.contains(&kind) && it.guests == guests
                });
                cases.extend(here.map(|scenario| Case { scenario, backend: *backend, kind }));
            }
        }
    }
    cases
}

impl Case {
    /// `disk-verify:linux:pv`
    fn id(&self) -> String {
        let word = |value| serde_json::to_value(value).ok();
        let backend = word(json!(self.backend));
        let kind = word(json!(self.kind));
        let text = |value: Option<serde_json::Value>| {
            value.and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
        };
        format!("{}:{}:{}", self.scenario.name, text(backend), text(kind))
    }
}

/// Returns the case of a name such as `disk-verify:linux:pv`.
pub fn find(id: &str) -> Option<Case> {
    all().into_iter().find(|case| case.id() == id)
}

/// Prints all cases as a JSON array, in the order in which they should run.
///
/// # Errors
/// None.
pub fn print() -> Result<()> {
    let rows: Vec<_> = all()
        .iter()
        .map(|case| {
            json!({
                "id": case.id(), "name": case.scenario.name, "backend": case.backend,
                "kind": case.kind, "proves": case.scenario.proves,
            })
        })
        .collect();
    println!("{}", serde_json::Value::from(rows));
    Ok(())
}
