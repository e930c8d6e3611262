//! The report of a running confined process.

use crate::parent::{has, is_root, scenario, start};
use pvio_confinement::report::SeccompMode;
use pvio_confinement::{Applied, Enforcement, Layer, Outcome, ProcessKind, Report};
use std::io::{BufRead, BufReader};
use std::process::Stdio;

pub const TESTS: &[(&str, fn())] =
    &[("report_of_a_confined_process_shows_its_layers", shows_layers)];

fn shows_layers() {
    let scenario = scenario(ProcessKind::Disk, Some(Enforcement::Kill), "wait");
    let mut child = start(&scenario, Stdio::piped());
    let mut out = BufReader::new(child.stdout.take().unwrap()).lines();
    let applied: Applied = serde_json::from_str(&out.next().unwrap().unwrap()).unwrap();
    let report = Report::of(child.id());
    // It ends when its standard input does.
    drop(child.stdin.take());
    let ended = child.wait().unwrap();
    let report = report.unwrap().with_applied(applied.clone());
    println!("{report}");
    assert!(ended.success(), "{ended}");

    assert_eq!(report.contradictions(), []);
    for (layer, outcome) in applied.iter() {
        let shown = report.observed(layer);
        let is_visible = !matches!(layer, Layer::Cgroup | Layer::Limits | Layer::Landlock);
        // Namespaces, descriptors and the root of another user's process are visible to root only.
        if is_visible && is_root() && *outcome != Outcome::NotConfigured {
            assert_eq!(shown, Some(outcome.is_applied()), "{layer}: {outcome}");
        }
    }
    assert!(report.no_new_privileges);
    if has(&applied, &[Layer::SystemCalls]) {
        assert_eq!(report.seccomp, SeccompMode::Filter);
        assert_eq!((report.threads, report.threads_without_seccomp), (2, 0));
    }
    assert_eq!(report.limits["core-file-size"], [Some(0), Some(0)]);
    if !is_root() {
        return println!("SKIPPED: descriptors and memory of the process; run as root");
    }
    let descriptors = report.descriptors.as_ref().unwrap();
    assert_eq!((descriptors["io_uring"], descriptors["directory"]), (2, 2), "{descriptors:?}");
    // Standard input, output and error. The test may have inherited others.
    assert!(descriptors["pipe"] >= 3, "{descriptors:?}");
    assert!(report.memory.unwrap().pss_kib > 0);
}
