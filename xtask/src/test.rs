//! `cargo xtask test`: the steps, how tests are counted, the summary line.
//!
//! | module | contents |
//! |---|---|
//! | [`steps`] | steps that consist of one cargo command |
//! | [`units`] | the unit and integration tests, several programs at a time |
//! | [`examples`] | runs the examples of the libraries |
//! | [`package`] | checks that the crates can be published |
//! | [`policy`] | licences and sources of dependencies; compatibility with the last release |
//! | [`fuzz`] | the fuzz targets, on the nightly toolchain |
//! | [`sanitizer`] | the tests of packages with `unsafe` code, with AddressSanitizer |
//! | [`tally`] | counts from the output of `cargo test` |
//! | [`nostd`] | checks that the device code links without `std` |
//! | [`quick`] | short checks of the changed files |
//! | [`layers`] | allowed dependencies, `unsafe` code, locations of xenstore keys, links and names in the documentation |

mod examples;
mod fuzz;
mod layers;
mod nostd;
mod package;
mod policy;
mod quick;
mod sanitizer;
mod steps;
mod tally;
mod units;

pub use layers::write_tables;

use std::time::{Duration, Instant};

use anyhow::Result;
use clap::ValueEnum;

use crate::report::{Counts, Report};
use crate::tools::{self, Tools};
use crate::{e2e, exec, lab, sim};

/// The steps, in the order in which they run.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Step {
    /// The sources are formatted.
    Fmt,
    /// clippy reports no warning, with all features and for all targets.
    Clippy,
    /// Unit and integration tests.
    Unit,
    /// The documentation builds without a warning. Its examples and those of the libraries run.
    Doc,
    /// The device code links without `std`, and a dependency on `std` would break the build.
    Nostd,
    /// The protocols between threads and domains, in all interleavings.
    Loom,
    /// Only if named: simulations of whole devices, with other seeds each time.
    Sim,
    /// Allowed dependencies of packages and modules, `unsafe` code, locations of xenstore keys, links
    /// and names in the documentation.
    Layers,
    /// Every crate can be published.
    Package,
    /// Licences, versions, sources and advisories of all dependencies (`deny.toml`).
    Deny,
    /// The libraries are compatible with the last release, as their versions say.
    Semver,
    /// Each fuzz target for 20 seconds, on the nightly toolchain.
    Fuzz,
    /// The real command, real disk images, a hosted guest.
    E2e,
    /// Real Xen, a Debian dom0 and stock Debian guests, emulated.
    Lab,
    /// Only if named: formatting, layers, clippy and unit tests of what has changed since the merge
    /// base.
    Quick,
    /// Only if named: more than 500 kills of processes of disks, AddressSanitizer over the tests of
    /// packages with `unsafe` code, and each fuzz target for 10 minutes.
    Long,
}

/// The steps that run if none is named: fast ones first.
const ALL: &[Step] = &[
    Step::Fmt,
    Step::Layers,
    Step::Clippy,
    Step::Unit,
    Step::Doc,
    Step::Nostd,
    Step::Loom,
    Step::Package,
    Step::Deny,
    Step::Semver,
    Step::Fuzz,
    Step::E2e,
    Step::Lab,
];

impl Step {
    fn run(self, install: bool) -> Result<Report> {
        match self {
            Self::Fmt => steps::fmt(),
            Self::Clippy => steps::clippy(),
            Self::Unit => units::unit(),
            Self::Doc => steps::doc(),
            Self::Nostd => nostd::run(),
            Self::Loom => steps::loom(),
            Self::Sim => sim::check(),
            Self::Layers => layers::run(),
            Self::Package => package::run(),
            Self::Deny => policy::deny(),
            Self::Semver => policy::semver(),
            Self::Fuzz => fuzz::run(fuzz::SHORT),
            Self::E2e => e2e::run(),
            Self::Lab => lab::check(install),
            Self::Quick => quick::run(),
            Self::Long => Ok(steps::kills()?.and(sanitizer::run()?).and(fuzz::run(fuzz::LONG)?)),
        }
    }

    /// Returns whether the step runs programs of Debian packages.
    fn needs_tools(self) -> bool {
        matches!(self, Self::Clippy | Self::Unit | Self::Doc | Self::E2e | Self::Long)
    }

    fn name(self) -> String {
        self.to_possible_value().expect("no step is hidden").get_name().to_owned()
    }
}

/// Runs `steps`, or all if none is named, and prints the table and the summary line. Returns
/// whether nothing failed.
///
/// # Errors
/// A signal requested a stop.
pub fn run(steps: &[Step], install: bool) -> Result<bool> {
    let steps = if steps.is_empty() { ALL } else { steps };
    let mut table = Vec::new();
    if steps.iter().any(|step| step.needs_tools()) {
        table.push(timed("tools", || find_tools(install)));
    }
    for step in steps {
        exec::go_on()?;
        table.push(timed(&step.name(), || step.run(install)));
    }
    exec::go_on()?;

    println!("\n{:<8} {:<18} {:>8}  {:<}", "step", "result", "seconds", "tests");
    for (name, time, report) in &table {
        let verdict = report.verdict();
        println!("{name:<8} {verdict:<18} {:>8.1}  {}", time.as_secs_f64(), report.counts);
    }
    let all: Counts = table.iter().map(|(.., report)| report.counts).sum();
    println!("\n{all}");
    Ok(all.failed == 0)
}

fn timed(name: &str, step: impl FnOnce() -> Result<Report>) -> (String, Duration, Report) {
    println!("==> {name}");
    let start = Instant::now();
    let report = step().unwrap_or_else(|error| Report::failed(format!("{error:#}")));
    let time = start.elapsed();
    for note in &report.notes {
        println!("    {note}");
    }
    if !report.trouble.is_empty() {
        println!("{}", report.trouble.trim_end());
    }
    println!("    {} in {:.1} s: {}", report.verdict(), time.as_secs_f64(), report.counts);
    (name.to_owned(), time, report)
}

fn find_tools(install: bool) -> Result<Report> {
    Ok(match tools::ensure(install)? {
        Tools::Ready(installed) if installed.is_empty() => Report::passed(),
        Tools::Ready(installed) => {
            Report { notes: vec![format!("installed {}", installed.join(" "))], ..Report::passed() }
        }
        Tools::Missing(what) => Report::skipped(what),
    })
}
