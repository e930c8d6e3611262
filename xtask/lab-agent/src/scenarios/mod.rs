//! What the lab shows, one table for each family.
//!
//! | module | holds |
//! |---|---|
//! | [`disk`] | disks: every byte, file systems, flushes, read-only |
//! | [`nic`] | NICs: every size, both ways, with and without offloads |
//! | [`hotplug`] | devices that come and go while others work; drivers that do |
//! | [`policies`] | how pvio reaches guests' pages |
//! | [`frontends`] | guests that say wrong things of their devices |
//! | [`own`] | pvio's frontends against every backend |
//! | [`toolstack`] | a toolstack that does |
//! | [`beside`] | pvio beside Linux's backends |
//! | [`driver_domain`] | devices served by another guest, that dies |
//! | [`hvm`] | a guest with a device model |
//! | [`matrix`] | disks in every shape, kept in every kind of thing |
//! | [`kernels`] | guests with older and newer kernels, and firmware |
//! | [`kept`] | what disks do, kept in every kind of thing |
//! | [`store`] | these kinds of things |
//! | [`life`] | guests that end, in every way, while their devices work; many at once |
//! | [`mod@bench`] | measurements, which are no part of `all` |
//! | [`volumes`] | disks that grow, that give room back, that are booted from |
//! | [`devices`] | disks on devices that are polled, or discard securely |
//! | [`migrate`] | guests that are migrated while their devices work |
//! | [`survival`] | backends that end, and guests that go on |

mod bench;
mod beside;
mod devices;
mod disk;
mod driver_domain;
mod frontends;
mod hotplug;
mod hvm;
mod kept;
mod kernels;
mod life;
mod matrix;
mod migrate;
mod nic;
mod own;
mod policies;
mod runner;
mod store;
mod survival;
mod toolstack;
mod volumes;

use anyhow::Result;
use serde_json::json;

use crate::dom0::backend::Backend;
use crate::dom0::guest::Kind;
use crate::dom0::lab::Lab;

/// Which guest a scenario works with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Guests {
    /// The one all scenarios of a backend and kind share.
    Shared,
    /// It makes its own; the shared one is sent away first, so that what is left behind is found.
    Own,
}

/// One claim, and how it is put to the test.
pub struct Scenario {
    /// Unique, the family first.
    pub name: &'static str,
    /// One line.
    pub proves: &'static str,
    /// Against whom it runs.
    pub backends: &'static [Backend],
    /// With which guests.
    pub kinds: &'static [Kind],
    /// Whose guest.
    pub guests: Guests,
    /// An error says what was seen instead.
    pub run: fn(&mut Lab) -> Result<()>,
}

/// A scenario with a backend and a kind of guest.
pub struct Case {
    /// What runs.
    pub scenario: &'static Scenario,
    /// Against whom.
    pub backend: Backend,
    /// With which guest.
    pub kind: Kind,
}

/// Everything there is to run disks against.
const DISKS: &[Backend] = &[Backend::Pvio, Backend::Linux, Backend::PvioDm, Backend::Qdisk];
/// Everything there is to run disks and NICs against.
const NICS: &[Backend] = &[Backend::Pvio, Backend::Linux];
const PVIO: &[Backend] = &[Backend::Pvio];
const PV: &[Kind] = &[Kind::Pv];
const BOTH: &[Kind] = &[Kind::Pv, Kind::Pvh];

/// All cases, those that can share a boot, a backend and a guest one after another.
fn all() -> Vec<Case> {
    let families = [
        disk::SCENARIOS,
        kept::SCENARIOS,
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

/// The case of a name like `disk-verify:linux:pv`.
pub fn find(id: &str) -> Option<Case> {
    all().into_iter().find(|case| case.id() == id)
}

/// Prints all cases as a JSON array, in the order they run best.
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
