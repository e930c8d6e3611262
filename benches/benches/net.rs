//! The NIC path with one packet at a time, to track pvio's own figure during development.
//! `pvio-bench net` compares it with a bare tap. Runs in a new network namespace.
#![forbid(unsafe_code)]

use criterion::{Criterion, Throughput, criterion_group};
use pvio_benches::net::{Attached, CASES};
use pvio_benches::netns;
use pvio_benches::until::Until;

fn net(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a scratch folder");
    let mut group = c.benchmark_group("net");
    group.throughput(Throughput::Elements(1));
    for case in &CASES {
        let mut nic = Attached::new(&dir.path().join(case.name), case).expect("an attached NIC");
        group.bench_function(case.name, |b| {
            b.iter_custom(|n| nic.drive(Until::Count(n)).expect("packets").time);
        });
    }
    group.finish();
}

criterion_group!(benches, net);

fn main() {
    if netns::outside() {
        return netns::enter().expect("a network namespace");
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
