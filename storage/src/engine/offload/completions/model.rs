//! Model of the way back, in every interleaving (`cargo xtask test loom`). The queue sleeps whenever
//! it may: a lost completion is a deadlock.

use super::*;
use crate::engine::offload::{Blocking, EngineError, Executor, Io, Job, Part};
use crate::engine::store::Store;
use alloc::sync::Arc;
use loom::thread;

fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(4);
    builder.check(model);
}

fn job(tag: u32, to: &Arc<Completions>) -> Job {
    let part = Part { tag, ..Part::default() };
    Job { io: Io::Flush, data: Vec::new(), part, to: Some(Arc::clone(to)) }
}

#[test]
fn queue_that_sleeps_sees_each_finished_and_each_lost_job_once() {
    check(|| {
        let completions = Arc::new(Completions::new(EventFd::new().unwrap()));
        let jobs = [job(0, &completions), job(1, &completions)];
        let threads = jobs.map(|job| {
            thread::spawn(move || if job.part.tag == 0 { job.finish(Ok(())) } else { drop(job) })
        });
        let mut finished = Vec::new();
        while finished.len() < 2 {
            completions.event.wait();
            completions.take(&mut finished);
        }
        finished.sort_by_key(|finished| finished.part.tag);
        let results: Vec<_> = finished.iter().map(|f| (f.part.tag, f.result)).collect();
        assert_eq!(results, [(0, Ok(())), (1, Err(EngineError::Lost))]);
        for thread in threads {
            thread.join().unwrap();
        }
        completions.take(&mut finished);
        assert_eq!(finished.len(), 2);
    });
}

/// Finishes each job on a thread of its own.
struct Threads;

impl Executor for Threads {
    fn execute(&self, jobs: &mut dyn Iterator<Item = Job>) {
        jobs.for_each(|job| drop(thread::spawn(move || job.finish(Ok(())))));
    }
}

#[test]
fn blocking_call_returns_when_its_job_has_finished() {
    check(|| Blocking::new(Arc::new(Threads), 1).unwrap().flush().unwrap());
}
