//! Protocols between threads, model-checked: the shipped code on loom's atomics and locks.
//!
//! Run with `cargo xtask test loom`.
#![forbid(unsafe_code)]

#[cfg(not(loom))]
#[test]
#[ignore = "SKIPPED: model checking needs RUSTFLAGS=\"--cfg loom\" and --release"]
fn model_checking_was_not_built() {}

#[cfg(loom)]
mod model {
    use loom::sync::atomic::{AtomicU32, Ordering};
    use loom::thread;
    use pvio_runtime::{BucketRate, LogLimit, Setting, SettingReader, TokenBucket, Wakeup};
    // Not loom's: dropping that one while a detected deadlock unwinds panics a second time.
    use std::sync::Arc;
    use std::time::Duration;

    const NOW: Duration = Duration::from_secs(1);

    fn check(model: impl Fn() + Send + Sync + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(4);
        builder.check(model);
    }

    /// The callers of `wake` make their work visible without any ordering of their own; the taker
    /// sleeps whenever there is something left to wait for.
    #[test]
    fn wakeup_makes_all_work_visible_and_none_is_missed() {
        check(|| {
            let wakeup = Wakeup::new().unwrap();
            let work = Arc::new([AtomicU32::new(0), AtomicU32::new(0)]);
            let wakers: Vec<_> = (0..2)
                .map(|i| {
                    let (wakeup, work) = (wakeup.clone(), Arc::clone(&work));
                    thread::spawn(move || {
                        work[i].store(1, Ordering::Relaxed);
                        wakeup.wake();
                    })
                })
                .collect();
            while work.iter().map(|n| n.load(Ordering::Relaxed)).sum::<u32>() < 2 {
                wakeup.wait();
                wakeup.take();
            }
            wakers.into_iter().for_each(|waker| waker.join().unwrap());
        });
    }

    #[test]
    fn wakeup_taken_without_its_work_is_pending_again() {
        check(|| {
            let wakeup = Wakeup::new().unwrap();
            let work = Arc::new(AtomicU32::new(0));
            let (waker, shared) = (wakeup.clone(), Arc::clone(&work));
            let waker = thread::spawn(move || {
                shared.store(1, Ordering::Relaxed);
                waker.wake();
            });
            // Nobody waits here: only the flag says whether there is work.
            let taken = wakeup.take();
            let seen = work.load(Ordering::Relaxed) == 1;
            assert!(!taken || seen, "a wake-up without its work");
            waker.join().unwrap();
            assert!(taken || wakeup.is_pending(), "a lost wake-up");
        });
    }

    #[test]
    fn reader_of_a_setting_that_changes_finds_the_last_value() {
        check(|| {
            let setting = Setting::new(0_u32);
            let writer = {
                let setting = Arc::clone(&setting);
                thread::spawn(move || (1..=2).for_each(|value| setting.set(value)))
            };
            // Created while the setting changes.
            let mut reader = SettingReader::new(&setting);
            let first = *reader.get();
            if reader.refresh() {
                assert!(*reader.get() >= first, "an older value");
            }
            writer.join().unwrap();
            reader.refresh();
            assert_eq!(*reader.get(), 2, "a change was missed");
            assert!(!reader.refresh(), "a change of nothing");
        });
    }

    #[test]
    fn concurrent_updates_of_a_setting_are_all_applied() {
        check(|| {
            let count = Setting::new(0_u32);
            let other = Arc::clone(&count);
            let other = thread::spawn(move || other.update(|count| count + 1));
            count.update(|count| count + 1);
            other.join().unwrap();
            assert_eq!(*count.get(), 2);
        });
    }

    #[test]
    fn threads_take_no_more_than_a_bucket_holds_and_lose_nothing() {
        let rate = BucketRate::per_second(1000, 3);
        check(move || {
            let bucket = Arc::new(TokenBucket::new());
            let takers: Vec<_> = (0..2)
                .map(|_| {
                    let bucket = Arc::clone(&bucket);
                    thread::spawn(move || u32::from(bucket.try_take(rate, 2, NOW)))
                })
                .collect();
            bucket.take(rate, 1, NOW);
            let taken: u32 = takers.into_iter().map(|taker| taker.join().unwrap()).sum();
            assert!(taken <= 1, "more than the capacity");
            assert_eq!(bucket.taken(rate, NOW), u64::from(1 + 2 * taken), "units were lost");
        });
    }

    #[test]
    fn debt_of_threads_that_do_not_wait_is_bounded_together() {
        let rate = BucketRate::per_second(1000, 0);
        check(move || {
            let bucket = Arc::new(TokenBucket::new());
            let other = Arc::clone(&bucket);
            let take = move |bucket: &TokenBucket| {
                bucket.take_within(rate, 8, NOW, Duration::from_millis(10));
            };
            let other = thread::spawn(move || take(&other));
            take(&bucket);
            other.join().unwrap();
            assert_eq!(bucket.taken(rate, NOW), 10);
        });
    }

    #[test]
    fn log_limit_reports_every_suppressed_event_once() {
        check(|| {
            let limit = Arc::new(LogLimit::new());
            // The burst, except for one line.
            let before: Vec<u64> = (0..9).filter_map(|_| limit.admit()).collect();
            assert_eq!(before, [0; 9]);
            let admit = |limit: &LogLimit| (0..2).filter_map(|_| limit.admit()).collect::<Vec<_>>();
            let other = Arc::clone(&limit);
            let other = thread::spawn(move || admit(&other));
            let own = admit(&limit);
            let lines = [own, other.join().unwrap()].concat();
            assert_eq!(lines.len(), 1, "one line is left");
            assert_eq!(limit.seen(), 13);
            assert!(lines[0] <= 3);
        });
    }
}
