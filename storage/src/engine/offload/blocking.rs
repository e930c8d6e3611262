//! Blocking calls over an executor.

use super::{Completions, Executor, Job, Part};
use crate::engine::store::Store;
use crate::engine::{EngineError, Io};
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_runtime::EventFd;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Adapts an executor to a [`Store`]: each call waits for its operation.
pub(crate) struct Blocking {
    executor: Arc<dyn Executor>,
    /// Without calls in progress.
    spare: Mutex<Vec<Arc<Completions>>>,
}

impl Blocking {
    /// Creates a store for `calls` calls at a time; more need a descriptor each.
    ///
    /// # Errors
    /// The system's error if it has no free descriptor.
    pub fn new(executor: Arc<dyn Executor>, calls: usize) -> io::Result<Self> {
        let spare: io::Result<_> = (0..calls).map(|_| completions()).collect();
        Ok(Self { executor, spare: Mutex::new(spare?) })
    }

    fn spare(&self) -> MutexGuard<'_, Vec<Arc<Completions>>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(&self, io: Io, data: Vec<u8>) -> io::Result<Vec<u8>> {
        let spare = self.spare().pop();
        let to = match spare {
            Some(spare) => spare,
            None => completions()?,
        };
        let job = Job { io, data, part: Part::default(), to: Some(Arc::clone(&to)) };
        self.executor.execute(&mut core::iter::once(job));
        to.event.clear();
        let over = to.over().pop();
        let over = over.ok_or_else(|| io::Error::other("an operation got lost"))?;
        self.spare().push(to);
        match over.result {
            Ok(()) => Ok(over.data),
            Err(EngineError::Os(errno)) => Err(io::Error::from_raw_os_error(errno)),
            Err(EngineError::Short) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(EngineError::Unsupported) => Err(io::ErrorKind::Unsupported.into()),
            Err(error @ (EngineError::Lost | EngineError::StorageFull(_))) => {
                Err(io::Error::other(error))
            }
        }
    }
}

/// A blocking read of the eventfd is enough, because it is the only wait point.
fn completions() -> io::Result<Arc<Completions>> {
    Ok(Arc::new(Completions::new(EventFd::blocking()?)))
}

impl Store for Blocking {
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let data = self.call(Io::Read { sector: at / 512 }, alloc::vec![0; into.len()])?;
        into.copy_from_slice(&data);
        Ok(())
    }

    fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.call(Io::Write { sector: at / 512 }, from.to_vec()).map(drop)
    }

    fn flush(&self) -> io::Result<()> {
        self.call(Io::Flush, Vec::new()).map(drop)
    }

    fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        let io = Io::Discard { sector: at / 512, sectors: len / 512, secure: false };
        self.call(io, Vec::new()).map(drop)
    }

    fn write_zeroes(&self, at: u64, len: u64) -> io::Result<()> {
        self.call(Io::WriteZeroes { sector: at / 512, sectors: len / 512 }, Vec::new()).map(drop)
    }
}
