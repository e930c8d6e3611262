//! The port of a queue that is connected to a switch.
#![forbid(unsafe_code)]

use super::rx_queue::RxQueue;
use super::{Member, MemberQueue, Switch};
use crate::buffers::BufferPool;
use crate::queue_port::{PacketQueue, QueuePort};
use crate::segment::Segments;
use crate::{Checksum, NetPort, Offload, Packet, PortError, WouldBlock};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;
use pvio_netback::stats::Stats;
use pvio_runtime::{EventFd, PrivateBuf, SettingReader};
use std::io;

/// Connection of a queue to a switch, without a wait point.
#[derive(Debug)]
pub struct SwitchQueue {
    switch: Arc<Switch>,
    number: u16,
    rx: Arc<RxQueue>,
    members: SettingReader<Vec<Arc<Member>>>,
    pool: BufferPool,
    /// Time in seconds.
    now: u32,
    /// The last attempt to receive found no packet, so a non-empty receive queue means new
    /// packets.
    dry: bool,
}

impl SwitchQueue {
    /// Packets that do not fit into the receive queue are counted in `stats`.
    #[must_use]
    pub fn new(queue: MemberQueue, stats: &Arc<Stats>) -> Self {
        let MemberQueue { switch, number, rx } = queue;
        rx.count_in(stats);
        let (members, pool) = (SettingReader::new(&switch.members), BufferPool::new(0));
        Self { switch, number, rx, members, pool, now: 0, dry: false }
    }

    /// Returns the eventfd that is notified when packets arrive while the receiver sleeps.
    pub(super) fn arrivals(&self) -> &EventFd {
        self.rx.event()
    }

    /// Sends the packet to one member, which takes over the buffer.
    fn hand_over(&mut self, to: &RxQueue, packet: Packet<PrivateBuf>) {
        let buf = if packet.offload.gso.is_some_and(|gso| !to.takes(gso)) {
            copy(to, &packet);
            packet.buf
        } else {
            to.exchange(packet)
        };
        self.pool.give_back(buf);
    }
}

/// Sends a copy of the packet to a member, in segments if required.
fn copy(to: &RxQueue, packet: &Packet<PrivateBuf>) {
    let frame = packet.frame();
    let Some(gso) = packet.offload.gso.filter(|gso| !to.takes(*gso)) else {
        let Some(mut buf) = to.reserve(frame.len()) else { return };
        let space = buf.as_mut_slice().get_mut(..frame.len()).unwrap_or_default();
        space.copy_from_slice(frame);
        return to.push(Packet { buf, start: 0, len: frame.len(), offload: packet.offload });
    };
    // A packet that cannot be segmented is not valid TCP and is dropped.
    let Some(mut segments) = Segments::of(frame, gso) else { return };
    while let Some(mut buf) = to.reserve(segments.len_max()) {
        let Some(len) = segments.write(buf.as_mut_slice()) else {
            return to.recycle(buf);
        };
        let offload = Offload { checksum: Checksum::Validated, gso: None };
        to.push(Packet { buf, start: 0, len, offload });
    }
}

/// Returns the queue of a member for a frame: all packets of a flow use the same.
fn queue_of<'a>(member: &'a Member, frame: &[u8]) -> Option<&'a Arc<RxQueue>> {
    if let [only] = &member.queues[..] {
        return Some(only);
    }
    // MAC addresses; for IPv4 without options and for IPv6 also IP addresses and ports.
    let more = match frame.get(12..14) {
        Some([8, 0]) => frame.get(26..38),
        Some([0x86, 0xdd]) => frame.get(22..58),
        _ => None,
    };
    let bytes = frame.iter().take(12).chain(more.unwrap_or_default());
    let mix = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325, mix) >> 32;
    let index = hash.checked_rem(member.queues.len() as u64)?;
    member.queues.get(usize::try_from(index).ok()?)
}

impl NetPort for SwitchQueue {
    type Buf = PrivateBuf;
    const HEADROOM: usize = 0;

    fn reserve(&mut self) -> Result<PrivateBuf, WouldBlock> {
        self.pool.reserve()
    }

    fn fit(&mut self, buf: PrivateBuf, len: usize) -> PrivateBuf {
        self.pool.fit(buf, len)
    }

    fn unreserve(&mut self, buf: PrivateBuf) {
        self.pool.give_back(buf);
    }

    fn send(&mut self, packet: Packet<PrivateBuf>) -> Result<(), PortError> {
        let frame = packet.frame();
        let Some([to, from]) = frame.first_chunk::<12>().map(addresses) else {
            self.pool.give_back(packet.buf);
            return Err(PortError::Unsuited);
        };
        if from[0] & 1 == 0 {
            self.switch.table.learn(from, self.number, self.now);
        }
        let known = if to[0] & 1 == 0 { self.switch.table.find(to, self.now) } else { None };
        let members = self.members.get();
        let at = known.and_then(|n| members.binary_search_by_key(&n, |m| m.number).ok());
        match at.and_then(|at| members.get(at)) {
            // The destination is the sending member itself.
            Some(member) if member.number == self.number => self.pool.give_back(packet.buf),
            Some(member) => {
                if let Some(rx) = queue_of(member, frame).map(Arc::clone) {
                    self.hand_over(&rx, packet);
                }
            }
            None => {
                let others = members.iter().filter(|member| member.number != self.number);
                let queues = others.filter_map(|member| queue_of(member, frame));
                queues.for_each(|rx| copy(rx, &packet));
                self.pool.give_back(packet.buf);
            }
        }
        Ok(())
    }

    fn receive(&mut self) -> Option<Packet<PrivateBuf>> {
        let packet = self.rx.pop();
        self.dry = packet.is_none();
        packet
    }

    fn recycle(&mut self, buf: PrivateBuf) {
        self.rx.recycle(buf);
    }

    fn flush(&mut self) {}

    fn set_clock(&mut self, now: Duration) {
        self.now = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
        self.dry = false;
        self.members.refresh();
    }
}

fn addresses(head: &[u8; 12]) -> [[u8; 6]; 2] {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = *head;
    [[a, b, c, d, e, f], [g, h, i, j, k, l]]
}

impl PacketQueue for SwitchQueue {
    fn event(&self) -> Option<&EventFd> {
        Some(self.rx.event())
    }

    fn check(&self) -> io::Result<()> {
        if self.switch.has_lost_uplink() {
            return Err(io::Error::other("the uplink of its switch has ended"));
        }
        Ok(())
    }

    fn has_arrived(&self) -> bool {
        self.dry && !self.rx.is_empty()
    }

    fn may_sleep(&self) -> bool {
        // Packets that the receiver has not tried to take must not keep it awake.
        self.rx.may_sleep() || !self.dry
    }

    fn awake(&self) {
        self.rx.awake();
    }
}

/// Port of a queue that is connected to a switch.
pub type SwitchPort = QueuePort<SwitchQueue>;

impl SwitchPort {
    /// Creates the port. It must be used by the thread that creates it. Packets that do not fit into
    /// this queue are counted in `stats`.
    ///
    /// # Errors
    /// A system error.
    pub fn new(queue: MemberQueue, stats: &Arc<Stats>) -> io::Result<Self> {
        Self::on(SwitchQueue::new(queue, stats))
    }
}
