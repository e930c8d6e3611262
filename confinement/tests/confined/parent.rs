//! Starts a child and compares its report with the expected one.

use crate::child::{ARGUMENT, Scenario};
use pvio_confinement::{
    Applied, Enforcement, Layer, Layers, Missing, Outcome, ProcessKind, Reason, User,
};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};

/// What became of an attempt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// It succeeded.
    Done,
    /// It failed with an error number.
    Error(i32),
    /// A signal killed the process.
    Signal(i32),
}

pub const KILLED: Fate = Fate::Signal(libc::SIGSYS);
pub const EPERM: Fate = Fate::Error(libc::EPERM);
pub const EACCES: Fate = Fate::Error(libc::EACCES);
pub const ENOENT: Fate = Fate::Error(libc::ENOENT);

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Returns the layers of a kind, with an unprivileged user if this process may change it.
pub fn layers(kind: ProcessKind) -> Layers {
    let mut layers = Layers::of(kind);
    layers.user = is_root().then_some(User { uid: 65534, gid: 65534 });
    layers
}

pub fn scenario(kind: ProcessKind, calls: Option<Enforcement>, attempt: &str) -> Scenario {
    Scenario {
        kind,
        layers: layers(kind),
        calls,
        attempt: attempt.to_owned(),
        target: String::new(),
        own_pid_namespace: true,
        parent: std::process::id().cast_signed(),
    }
}

/// Starts a child.
pub fn start(scenario: &Scenario, stdin: Stdio) -> Child {
    let json = serde_json::to_string(scenario).expect("a scenario is plain data");
    let mut child = Command::new(std::env::current_exe().expect("this program"));
    child.args([ARGUMENT, &json]).env("RUST_BACKTRACE", "1").stdin(stdin);
    child.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = match scenario.own_pid_namespace {
        true => pvio_confinement::spawn(&mut child).map(|(child, _)| child),
        false => child.spawn(),
    };
    child.expect("a child")
}

/// Runs a child to its end.
pub fn run(scenario: &Scenario) -> (Applied, Fate) {
    let child = start(scenario, Stdio::null());
    let output = child.wait_with_output().expect("its output");
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let mut lines = out.lines();
    let context = || format!("{}: {:?}\n{out}\n{err}", scenario.attempt, output.status);
    let applied = lines.next().unwrap_or_else(|| panic!("{}", context()));
    let applied: Applied = serde_json::from_str(applied).expect("what was applied");
    let fate = match (output.status.signal(), lines.next()) {
        (Some(signal), None) => Fate::Signal(signal),
        (None, Some("0")) => Fate::Done,
        (None, Some(error)) => Fate::Error(error.parse().expect("an error number")),
        _ => panic!("{}", context()),
    };
    (applied, fate)
}

/// Returns whether the layers are there; prints which the kernel lacks. Any other reason is a failure.
pub fn has(applied: &Applied, layers: &[Layer]) -> bool {
    let mut all = true;
    for (layer, outcome) in applied.missing(layers) {
        let Outcome::Missing(Missing { reason, detail }) = outcome else {
            panic!("{layer} was not configured")
        };
        assert!(
            matches!(reason, Reason::NotBuilt | Reason::NotEnabled)
                || (reason == Reason::NotPermitted && !is_root()),
            "{layer}: {reason:?}: {detail}"
        );
        println!("SKIPPED: {layer}: {reason:?}: {detail}");
        all = false;
    }
    all
}

/// Runs attempts without a filter, and with one that kills.
pub fn expect(kind: ProcessKind, needs: &[Layer], attempts: &[(&str, &[Fate], Fate)]) {
    for (attempt, alone, filtered) in attempts {
        let (applied, fate) = run(&scenario(kind, None, attempt));
        if has(&applied, needs) {
            assert!(alone.contains(&fate), "{attempt} without a filter: {fate:?}");
        }
        let (applied, fate) = run(&scenario(kind, Some(Enforcement::Kill), attempt));
        if has(&applied, &[Layer::SystemCalls]) {
            assert_eq!(fate, *filtered, "{attempt} with a filter");
        }
    }
}
