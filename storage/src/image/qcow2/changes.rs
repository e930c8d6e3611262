//! Changes of tables that a library holds in memory are in the file when a write completes.
//!
//! A process that is killed loses its memory. Its successor resumes the session, and the guest expects
//! to read what it wrote, although it has not flushed. So a write that allocates clusters completes when
//! the changed tables are in the file, and so does any other write in the meantime: it may be to a
//! cluster that an unfinished write has allocated. One flush of the tables serves all writes that
//! waited for it.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Writes of one image.
#[derive(Default)]
pub(super) struct TableChanges {
    /// Number of allocating writes that have begun, and whose tables are not in the file.
    unwritten: AtomicUsize,
    /// Number of writes that wait, or have waited, for tables.
    done: AtomicUsize,
    written: Mutex<Written>,
}

#[derive(Default)]
struct Written {
    /// The value of `done` that the last flush of the tables covers.
    done: usize,
    /// Number of allocating writes whose flush of the tables failed. The next one covers them.
    failed: usize,
}

impl TableChanges {
    /// Performs a `write`, which changes tables if it `allocates`, and then `flush`, which writes
    /// changed tables to the file, if any may have changed.
    ///
    /// # Errors
    /// Of `write` or `flush`.
    pub fn write(
        &self,
        allocates: bool,
        write: impl FnOnce() -> io::Result<()>,
        flush: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        if allocates {
            self.unwritten.fetch_add(1, Ordering::SeqCst);
        }
        let result = write();
        if self.unwritten.load(Ordering::SeqCst) == 0 {
            return result;
        }
        // A write that failed may have allocated clusters, too. If this fails, `unwritten` stays: no
        // later write completes without a flush, until one succeeds.
        let mine = self.done.fetch_add(1, Ordering::SeqCst) + 1;
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if written.done < mine {
            let covered = self.done.load(Ordering::SeqCst);
            if let Err(error) = flush() {
                written.failed += usize::from(allocates);
                return Err(error);
            }
            written.done = covered;
            let failed = std::mem::take(&mut written.failed);
            self.unwritten.fetch_sub(failed, Ordering::SeqCst);
        }
        drop(written);
        if allocates {
            self.unwritten.fetch_sub(1, Ordering::SeqCst);
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::sync::Barrier;

    #[test]
    fn write_that_allocates_is_followed_by_a_flush_of_tables() {
        let (changes, flushes) = (TableChanges::default(), Cell::new(0));
        let flush = || {
            flushes.set(flushes.get() + 1);
            Ok(())
        };
        for (allocates, expected) in [(false, 0), (true, 1), (false, 1), (true, 2)] {
            changes.write(allocates, || Ok(()), flush).unwrap();
            assert_eq!(flushes.get(), expected);
        }
    }

    #[test]
    fn write_beside_an_unfinished_allocation_waits_for_its_tables() {
        let (changes, flushes) = (TableChanges::default(), AtomicUsize::new(0));
        let (allocated, other) = (Barrier::new(2), Barrier::new(2));
        let flush = || {
            flushes.fetch_add(1, Ordering::SeqCst);
            Ok(())
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let write = || {
                    allocated.wait();
                    other.wait();
                    Ok(())
                };
                changes.write(true, write, flush).unwrap();
            });
            allocated.wait();
            changes.write(false, || Ok(()), flush).unwrap();
            assert_eq!(flushes.load(Ordering::SeqCst), 1, "its cluster may be the one allocated");
            other.wait();
        });
        assert_eq!(flushes.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn failed_flush_of_tables_fails_writes_until_one_succeeds() {
        let changes = TableChanges::default();
        let failing = || Err(io::ErrorKind::StorageFull.into());
        assert!(changes.write(true, || Ok(()), failing).is_err());
        assert!(changes.write(false, || Ok(()), failing).is_err());
        assert!(changes.write(false, || Ok(()), || Ok(())).is_ok());
        assert!(changes.write(false, || Ok(()), failing).is_ok(), "nothing is left to be flushed");
    }
}
