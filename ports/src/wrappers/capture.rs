//! Packet capture of a vif, which can be started and stopped while the vif runs. The format is
//! pcapng with timestamps in nanoseconds.
//!
//! Without a capture, the cost is one test per packet. A capture has a bounded number of records.
//! When the reader is too slow, packets are not captured, which is counted, and the vif goes on.
//!
//! A packet is captured as it passes the vif: an unsegmented packet is one record, and a blank
//! checksum is blank. The record's comment states this. Its flags hold the direction from the
//! guest's view: outbound packets are those that the guest sends (including packets that a guard
//! then drops).
#![forbid(unsafe_code)]

use super::inspect::{Inspected, Inspector};
use crate::pcapng::CapturedPacket;
use crate::{FRAME_MAX, NetPort, Offload};
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::time::Duration;
use crossbeam_queue::ArrayQueue;
use pvio_netback::fault::DropReason;
use pvio_runtime::Setting;
use std::io;
use std::thread::Thread;

/// Default number of bytes captured per packet: all.
pub const SNAPLEN: usize = FRAME_MAX;
/// Number of records that may wait to be read. Their memory is allocated lazily by the kernel.
const RECORDS: usize = 512;

/// Capture point of a vif.
#[derive(Clone, Debug)]
pub struct Probe {
    active: Arc<Setting<Option<Arc<ActiveCapture>>>>,
    taken: Arc<AtomicBool>,
}

impl Default for Probe {
    fn default() -> Self {
        Self { active: Setting::new(None), taken: Arc::default() }
    }
}

/// Error: another capture is active.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("it is being captured already, and can be so once at a time")]
pub struct Busy;

impl Probe {
    /// Starts a capture with up to `snaplen` bytes of each packet. The thread that calls this must
    /// read it.
    ///
    /// # Errors
    /// [`Busy`].
    pub fn open(&self, snaplen: usize) -> Result<Reader, Busy> {
        if self.taken.swap(true, Ordering::AcqRel) {
            return Err(Busy);
        }
        let snaplen = snaplen.min(SNAPLEN);
        let (free, full) = (ArrayQueue::new(RECORDS), ArrayQueue::new(RECORDS));
        for _ in 0..RECORDS {
            let _ = free.push(CapturedPacket::new(snaplen));
        }
        let (lost, reader) = (AtomicU64::new(0), std::thread::current());
        let active = Arc::new(ActiveCapture { snaplen, free, full, lost, reader });
        self.active.set(Some(Arc::clone(&active)));
        Ok(Reader { probe: self.clone(), active })
    }

    /// Returns a wrapper of `port` that can be captured at this point.
    pub fn wrap<N: NetPort>(&self, port: N) -> Capture<N> {
        Capture::new(port, &self.active)
    }
}

/// Capture in progress, shared by its reader and the queues of the vif.
#[derive(Debug)]
pub struct ActiveCapture {
    snaplen: usize,
    free: ArrayQueue<CapturedPacket>,
    full: ArrayQueue<CapturedPacket>,
    lost: AtomicU64,
    reader: Thread,
}

impl ActiveCapture {
    fn add(&self, frame: &[u8], offload: Offload, sent: bool) {
        let Some(mut record) = self.free.pop() else {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        };
        record.fill(frame, self.snaplen, offload, sent);
        // The queue has space for every record.
        let _ = self.full.push(record);
        self.reader.unpark();
    }
}

/// Reader of a capture, which ends when it is dropped.
#[derive(Debug)]
pub struct Reader {
    probe: Probe,
    active: Arc<ActiveCapture>,
}

impl Reader {
    /// Waits for packets, for at most `most`, and calls `each` for every available packet until it
    /// returns `false`.
    ///
    /// # Errors
    /// The error of `each`.
    pub fn read(
        &self,
        most: Duration,
        mut each: impl FnMut(&CapturedPacket) -> io::Result<bool>,
    ) -> io::Result<()> {
        if self.active.full.is_empty() {
            std::thread::park_timeout(most);
        }
        while let Some(record) = self.active.full.pop() {
            let more = each(&record);
            let _ = self.active.free.push(record);
            if !more? {
                break;
            }
        }
        Ok(())
    }

    /// Returns the number of packets that were not captured because no record was free.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.active.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.probe.active.set(None);
        self.probe.taken.store(false, Ordering::Release);
    }
}

/// Port that can be captured.
pub type Capture<N> = Inspected<N, Option<Arc<ActiveCapture>>>;

impl Inspector for Option<Arc<ActiveCapture>> {
    fn sent(&self, frame: &[u8], offload: Offload) -> Result<(), DropReason> {
        self.iter().for_each(|capture| capture.add(frame, offload, true));
        Ok(())
    }

    fn received(&self, frame: &[u8], offload: Offload) {
        self.iter().for_each(|capture| capture.add(frame, offload, false));
    }
}
