//! The disk path with one request at a time, to track pvio's own figure during development.
//! `pvio-bench disk` compares it with a bare io_uring.
#![forbid(unsafe_code)]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pvio_benches::disk::{Attached, CASES, image};
use pvio_benches::until::Until;

fn disk(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a scratch folder");
    let path = image(dir.path()).expect("an image");
    let mut group = c.benchmark_group("disk");
    group.throughput(Throughput::Elements(1));
    for case in &CASES {
        let mut disk = Attached::new(dir.path(), &path, case).expect("an attached disk");
        group.bench_function(case.name, |b| {
            b.iter_custom(|n| disk.drive(case, n, Until::Count(n)).expect("answers").time);
        });
    }
    group.finish();
}

criterion_group!(benches, disk);
criterion_main!(benches);
