//! Threads of a disk.

use alloc::string::String;
use std::io;
use std::sync::mpsc::sync_channel;
use std::thread::{Builder, JoinHandle};

/// Starts a thread, and returns when it runs. A new thread makes system calls that it does not make
/// later (`rseq`, `set_robust_list`, `prctl`), so that a filter for all threads, which is applied
/// after this, need not allow them.
///
/// # Errors
/// The system's error if it cannot create a thread.
pub(crate) fn start(
    name: &str,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let (running, started) = sync_channel(1);
    let thread = Builder::new().name(String::from(name)).spawn(move || {
        // The other end exists until this is received.
        let _ = running.send(());
        drop(running);
        work();
    })?;
    // Fails only if the thread has ended already.
    let _ = started.recv();
    Ok(thread)
}
