//! The port of a queue that is connected to a switch.
#![forbid(unsafe_code)]

use super::inbox::Inbox;
use super::{End, Member, Switch};
use crate::buffers::BufferPool;
use crate::segment::Segments;
use crate::wait::WaitPort;
use crate::{Checksum, NetPort, Offload, Packet, PortError, WouldBlock};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;
use pvio_netback::stats::Stats;
use pvio_runtime::{PrivateBuf, SettingReader, WaitPoint, Watch, WatchRing};
use std::io;
use std::os::fd::OwnedFd;

/// Connection of a queue to a switch, without a wait point.
#[derive(Debug)]
pub struct Lane {
    switch: Arc<Switch>,
    number: u16,
    inbox: Arc<Inbox>,
    members: SettingReader<Vec<Arc<Member>>>,
    pool: BufferPool,
    /// Time in seconds.
    now: u32,
    /// The last attempt to receive found no packet, so a non-empty inbox means new packets.
    dry: bool,
}

impl Lane {
    /// Packets that do not fit into this queue's inbox are counted in `stats`.
    #[must_use]
    pub fn new(end: End, stats: &Arc<Stats>) -> Self {
        let End { switch, number, inbox } = end;
        inbox.count_in(stats);
        let (members, pool) = (SettingReader::new(&switch.members), BufferPool::new(0));
        Self { switch, number, inbox, members, pool, now: 0, dry: false }
    }

    pub(super) fn inbox(&self) -> &Inbox {
        &self.inbox
    }

    /// Called before the receiver sleeps. Returns whether it may. Packets that the receiver has not
    /// tried to take must not keep it awake.
    pub(super) fn may_sleep(&self) -> bool {
        self.inbox.may_sleep() || !self.dry
    }

    /// Sends the packet to one member, which takes over the buffer.
    fn hand_over(&mut self, to: &Inbox, packet: Packet<PrivateBuf>) {
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
fn copy(to: &Inbox, packet: &Packet<PrivateBuf>) {
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
fn queue_of<'a>(member: &'a Member, frame: &[u8]) -> Option<&'a Arc<Inbox>> {
    if let [only] = &member.inboxes[..] {
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
    let index = hash.checked_rem(member.inboxes.len() as u64)?;
    member.inboxes.get(usize::try_from(index).ok()?)
}

impl NetPort for Lane {
    type Buf = PrivateBuf;
    const HEADROOM: usize = 0;

    fn reserve(&mut self) -> Result<PrivateBuf, WouldBlock> {
        self.pool.large.pop().ok_or(WouldBlock)
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
                if let Some(inbox) = queue_of(member, frame).map(Arc::clone) {
                    self.hand_over(&inbox, packet);
                }
            }
            None => {
                let others = members.iter().filter(|member| member.number != self.number);
                let inboxes = others.filter_map(|member| queue_of(member, frame));
                inboxes.for_each(|inbox| copy(inbox, &packet));
                self.pool.give_back(packet.buf);
            }
        }
        Ok(())
    }

    fn receive(&mut self) -> Option<Packet<PrivateBuf>> {
        let packet = self.inbox.pop();
        self.dry = packet.is_none();
        packet
    }

    fn recycle(&mut self, buf: PrivateBuf) {
        self.inbox.recycle(buf);
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

/// Connection of a queue to a switch, with the worker's wait point.
pub struct SwitchPort {
    lane: Lane,
    ring: WatchRing,
    arrived: Watch,
}

impl SwitchPort {
    /// Creates the port. It must be used by the thread that creates it.
    ///
    /// # Errors
    /// A system error.
    pub fn new(end: End, stats: &Arc<Stats>) -> io::Result<Self> {
        let lane = Lane::new(end, stats);
        let mut ring = WatchRing::new()?;
        let arrived = ring.watch(lane.inbox().event().to_fd()?)?;
        Ok(Self { lane, ring, arrived })
    }
}

impl WaitPoint for SwitchPort {
    fn watch(&mut self, file: OwnedFd) -> io::Result<Watch> {
        self.ring.watch(file)
    }

    fn fired(&mut self, watch: Watch) -> bool {
        self.ring.fired(watch)
    }

    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let waited = match self.lane.may_sleep() {
            true => self.ring.wait(timeout),
            false => Ok(()),
        };
        self.lane.inbox().awake();
        waited
    }
}

impl WaitPort for SwitchPort {
    fn poll(&mut self) -> io::Result<()> {
        self.ring.reap();
        if self.ring.fired(self.arrived) {
            self.lane.inbox().event().clear();
        }
        if self.lane.switch.has_lost_uplink() {
            return Err(io::Error::other("the uplink of its switch has ended"));
        }
        self.ring.poll()
    }

    fn has_work(&mut self) -> io::Result<bool> {
        let is_new = self.lane.dry && !self.lane.inbox().is_empty();
        Ok(is_new || self.ring.has_work()?)
    }
}

impl NetPort for SwitchPort {
    type Buf = PrivateBuf;
    const HEADROOM: usize = Lane::HEADROOM;

    fn reserve(&mut self) -> Result<PrivateBuf, WouldBlock> {
        self.lane.reserve()
    }

    fn fit(&mut self, buf: PrivateBuf, len: usize) -> PrivateBuf {
        self.lane.fit(buf, len)
    }

    fn unreserve(&mut self, buf: PrivateBuf) {
        self.lane.unreserve(buf);
    }

    fn send(&mut self, packet: Packet<PrivateBuf>) -> Result<(), PortError> {
        self.lane.send(packet)
    }

    fn receive(&mut self) -> Option<Packet<PrivateBuf>> {
        self.lane.receive()
    }

    fn recycle(&mut self, buf: PrivateBuf) {
        self.lane.recycle(buf);
    }

    fn flush(&mut self) {
        self.lane.flush();
    }

    fn set_clock(&mut self, now: Duration) {
        self.lane.set_clock(now);
    }
}

impl core::fmt::Debug for SwitchPort {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("SwitchPort").field("lane", &self.lane).finish_non_exhaustive()
    }
}
