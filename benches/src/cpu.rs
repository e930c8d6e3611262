//! Processor time of single threads.

use anyhow::{Context, Result};
use rustix::time::{ClockId, clock_gettime};
use std::path::PathBuf;
use std::time::Duration;

/// Returns the processor time of the calling thread since its start.
#[must_use]
pub fn of_this_thread() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

/// Another thread of this process.
#[derive(Debug)]
pub struct Thread(PathBuf);

impl Thread {
    /// Returns the thread of that name; only the first 15 bytes of the name are compared.
    ///
    /// # Errors
    /// There is none.
    pub fn named(name: &str) -> Result<Self> {
        for task in std::fs::read_dir("/proc/self/task")? {
            let path = task?.path();
            let comm = std::fs::read_to_string(path.join("comm")).unwrap_or_default();
            if comm.trim_end() == name {
                return Ok(Self(path.join("schedstat")));
            }
        }
        anyhow::bail!("no thread is named {name}")
    }

    /// Returns its processor time since its start.
    ///
    /// # Errors
    /// The thread has ended, or the kernel does not provide the value (`CONFIG_SCHED_INFO`).
    pub fn used(&self) -> Result<Duration> {
        let text = std::fs::read_to_string(&self.0)
            .with_context(|| format!("processor time in {}", self.0.display()))?;
        let nanoseconds = text.split(' ').next().and_then(|word| word.parse().ok());
        nanoseconds.map(Duration::from_nanos).context("processor time in schedstat")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn cpu_time_of_thread_counts_work_and_not_waiting() {
        let ((begin, begun), (done, is_done)) = (channel::<()>(), channel());
        let worker = std::thread::Builder::new().name("works".into()).spawn(move || {
            begun.recv().expect("a word");
            let before = of_this_thread();
            while of_this_thread() < before + Duration::from_millis(20) {}
            done.send(()).expect("a listener");
            begun.recv()
        });
        let worker = worker.expect("a thread");
        let seen = loop {
            if let Ok(thread) = Thread::named("works") {
                break thread;
            }
        };
        let (ours, before) = (of_this_thread(), seen.used().expect("its time"));
        begin.send(()).expect("a listener");
        is_done.recv().expect("an answer");
        let (ours, its) = (of_this_thread() - ours, seen.used().expect("its time") - before);
        assert!(its >= Duration::from_millis(15) && ours < its / 2, "{ours:?}, {its:?}");
        drop(begin);
        let _ = worker.join();
        assert!(Thread::named("nobody").is_err());
    }
}
