//! A wrapper that inspects every packet.
#![forbid(unsafe_code)]

use crate::{NetPort, Offload, Packet, PortError, WouldBlock};
use alloc::sync::Arc;
use core::time::Duration;
use pvio_netback::fault::DropReason;
use pvio_runtime::{Setting, SettingReader, WaitPoint, Wrapper};

/// Inspects the packets that pass a port. The packets are not changed.
pub trait Inspector {
    /// Inspects a frame that the guest sends.
    ///
    /// # Errors
    /// The reason to drop it.
    fn sent(&self, frame: &[u8], offload: Offload) -> Result<(), DropReason>;

    /// Inspects a frame that is received for the guest. The default implementation does nothing.
    fn received(&self, frame: &[u8], offload: Offload) {
        let _ = (frame, offload);
    }
}

/// Port whose packets are inspected. The inspector is a setting, so it can be replaced while packets
/// pass; a queue uses the new one from its next round on.
#[derive(Debug)]
pub struct Inspected<N, I> {
    port: N,
    inspector: SettingReader<I>,
}

impl<N, I> Inspected<N, I> {
    pub(super) fn new(port: N, inspector: &Arc<Setting<I>>) -> Self {
        Self { port, inspector: SettingReader::new(inspector) }
    }
}

impl<N: NetPort, I: Inspector> NetPort for Inspected<N, I> {
    type Buf = N::Buf;
    const HEADROOM: usize = N::HEADROOM;

    fn reserve(&mut self) -> Result<N::Buf, WouldBlock> {
        self.port.reserve()
    }

    fn fit(&mut self, buf: N::Buf, len: usize) -> N::Buf {
        self.port.fit(buf, len)
    }

    fn unreserve(&mut self, buf: N::Buf) {
        self.port.unreserve(buf);
    }

    fn send(&mut self, packet: Packet<N::Buf>) -> Result<(), PortError> {
        if let Err(reason) = self.inspector.get().sent(packet.frame(), packet.offload) {
            self.port.unreserve(packet.buf);
            return Err(PortError::Refused(reason));
        }
        self.port.send(packet)
    }

    fn receive(&mut self) -> Option<Packet<N::Buf>> {
        let packet = self.port.receive()?;
        self.inspector.get().received(packet.frame(), packet.offload);
        Some(packet)
    }

    fn recycle(&mut self, buf: N::Buf) {
        self.port.recycle(buf);
    }

    fn flush(&mut self) {
        self.port.flush();
    }

    fn set_clock(&mut self, now: Duration) {
        self.inspector.refresh();
        self.port.set_clock(now);
    }

    fn deadline(&self) -> Option<Duration> {
        self.port.deadline()
    }
}

impl<N: WaitPoint, I> Wrapper for Inspected<N, I> {
    type Inner = N;

    fn inner(&mut self) -> &mut N {
        &mut self.port
    }
}
