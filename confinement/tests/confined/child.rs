//! The child process: applies the layers, tries one thing, and reports.

use crate::attempts::{self, Held};
use pvio_confinement::{Enforcement, Layers, ProcessKind, SystemCalls};
use serde::{Deserialize, Serialize};
use std::process::ExitCode;

/// First argument of the child.
pub const ARGUMENT: &str = "--confined-child";

/// What a child does.
#[derive(Clone, Serialize, Deserialize)]
pub struct Scenario {
    pub kind: ProcessKind,
    pub layers: Layers,
    /// `None` installs no filter, so that the other layers are seen alone.
    pub calls: Option<Enforcement>,
    pub attempt: String,
    /// Argument of the attempt.
    pub target: String,
    /// Whether the parent creates a PID namespace.
    pub own_pid_namespace: bool,
    /// Process id of the parent.
    pub parent: i32,
}

/// Prints what was applied, and then the outcome of the attempt: 0 or an error number.
pub fn run(json: &str) -> ExitCode {
    let scenario: Scenario = serde_json::from_str(json).expect("a scenario");
    // Opened as by a parent that hands too much over.
    let early = attempts::open_early(&scenario);
    let mut applied = scenario.layers.apply().expect("one thread");
    let held = Held::after_layers(early);
    if let Some(enforcement) = scenario.calls {
        SystemCalls::of(scenario.kind).install(enforcement, &mut applied);
    }
    println!("{}", applied.to_json());
    let outcome = attempts::attempt(&scenario, held);
    println!("{}", outcome.err().map_or(0, |error| error.raw_os_error().unwrap_or(-1)));
    ExitCode::SUCCESS
}
