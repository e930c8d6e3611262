//! Unit tests of parsing and rendering.

use super::descriptors::kind;
use super::process::{Status, limits, memory};
use super::{Memory, Report, SeccompMode};
use crate::applied::{Applied, Layer, Outcome};

const LIMITS: &str = "\
Limit                     Soft Limit           Hard Limit           Units     
Max cpu time              unlimited            unlimited            seconds   
Max core file size        0                    0                    bytes     
Max open files            1024                 4096                 files     
";

#[test]
fn limits_are_read_by_name() {
    let limits = limits(LIMITS);
    assert_eq!(limits["cpu-time"], [None, None]);
    assert_eq!(limits["core-file-size"], [Some(0), Some(0)]);
    assert_eq!(limits["open-files"], [Some(1024), Some(4096)]);
    assert_eq!(limits.len(), 3);
}

#[test]
fn memory_is_read_in_kib() {
    let text =
        "55d0-7ffe ---p 00000000 00:00 0 [rollup]\nRss:  4096 kB\nPss:  1234 kB\nLocked: 8 kB\n";
    assert_eq!(memory(text), Memory { pss_kib: 1234, rss_kib: 4096, locked_kib: 8 });
}

#[test]
fn descriptor_kind_comes_from_its_link() {
    let file = || "file";
    for (link, expected) in [
        ("anon_inode:[io_uring]", "io_uring"),
        ("anon_inode:[eventfd]", "eventfd"),
        ("anon_inode:inotify", "inotify"),
        ("socket:[123]", "socket"),
        ("pipe:[123]", "pipe"),
        ("/memfd:ring (deleted)", "memfd"),
        ("net:[4026531840]", "namespace"),
        ("/dev/xen/gntdev", "gntdev"),
        ("/dev/net/tun", "tun"),
        ("/srv/disk.img", "file"),
    ] {
        assert_eq!(kind(link, file), expected, "{link}");
    }
}

#[test]
fn mask_that_cannot_be_read_is_not_empty() {
    assert_eq!(Status::parse("CapBnd:\t0000000000000000").mask("CapBnd"), 0);
    assert_eq!(Status::parse("CapBnd:\tnone").mask("CapBnd"), u64::MAX);
    assert_eq!(Status::parse("Name:\tpvio").mask("CapBnd"), u64::MAX);
}

#[test]
fn report_of_this_process_is_that_of_an_unconfined_one() {
    let report = Report::of(std::process::id()).unwrap();
    assert_eq!(report.pid, std::process::id());
    assert!(report.threads >= 2, "the harness and the test");
    for layer in [Layer::MountNamespace, Layer::PidNamespace, Layer::NoNewPrivileges] {
        assert_eq!(report.observed(layer), Some(false), "{layer}");
    }
    assert_eq!(report.observed(Layer::Landlock), None);
    assert!(report.memory.unwrap().pss_kib > 0);
    assert!(report.descriptors.as_ref().unwrap().values().sum::<u64>() >= 3);
    let again: Report = serde_json::from_str(&report.to_json()).unwrap();
    assert_eq!(again, report);
}

#[test]
fn layer_that_the_kernel_contradicts_is_reported() {
    let mut applied = Applied::default();
    applied.record(Layer::Landlock, Outcome::Applied("ABI 7".to_owned()));
    applied.record(Layer::NoNewPrivileges, Outcome::Applied(String::new()));
    let report = Report::of(std::process::id()).unwrap().with_applied(applied);
    assert_eq!(report.contradictions(), [Layer::NoNewPrivileges]);
    let text = report.to_string();
    let line = |start: &str| {
        text.lines().find(|line| line.trim_start().starts_with(start)).unwrap().trim().to_owned()
    };
    assert_eq!(
        line("no-new-privileges"),
        "no-new-privileges  no      applied, which the kernel contradicts"
    );
    assert_eq!(line("landlock"), "landlock           unknown applied: ABI 7");
    assert!(line("memory").ends_with("KiB locked"), "{text}");
}

#[test]
fn process_that_does_not_exist_has_no_report() {
    assert!(Report::of(u32::MAX).is_err());
}

#[test]
fn thread_without_filter_contradicts_the_filter() {
    let mut report = Report::of(std::process::id()).unwrap();
    report.seccomp = SeccompMode::Filter;
    report.threads_without_seccomp = 0;
    assert_eq!(report.observed(Layer::SystemCalls), Some(true));
    report.threads_without_seccomp = 1;
    assert_eq!(report.observed(Layer::SystemCalls), Some(false));
}
