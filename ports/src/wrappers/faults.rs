//! Fault injection: a link that drops, duplicates, reorders, corrupts and delays packets. The
//! faults are deterministic for a seed and a sequence of packets. Each direction is handled
//! separately.
#![forbid(unsafe_code)]

use crate::{NetPort, Packet, PacketBuf, PortError, WouldBlock};
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;
use pvio_netback::fault::DropReason;
use pvio_netback::stats::Stats;
use pvio_ring::proto::checksum::ETHERNET_HEADER;
use pvio_runtime::{Setting, SettingReader, WaitPoint, Wrapper};

/// Probabilities and delays of faults, applied to each packet independently. The default is no
/// faults.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FaultPlan {
    /// Packets lost, per million.
    pub lose: u32,
    /// Packets duplicated, per million.
    pub repeat: u32,
    /// Packets delayed by [`REORDER`], so that later packets overtake them, per million.
    pub reorder: u32,
    /// Packets with one inverted bit after their Ethernet header, per million.
    pub corrupt: u32,
    /// Delay of each packet.
    pub delay: Duration,
    /// Largest additional delay, evenly distributed. Packets may overtake each other.
    pub jitter: Duration,
    /// Seed of the random numbers.
    pub seed: u64,
}

/// Additional delay of a packet that is to be overtaken.
pub const REORDER: Duration = Duration::from_millis(3);
/// Limit of delayed packets in each direction. Further packets stay with the guest or the port.
const UNDER_WAY: usize = 128;

/// Fault plan of a vif, shared by its queues.
#[derive(Clone, Debug)]
pub struct Plans(Arc<Setting<FaultPlan>>);

impl Default for Plans {
    fn default() -> Self {
        Self(Setting::new(FaultPlan::default()))
    }
}

impl Plans {
    /// Replaces the plan; the random sequence restarts.
    pub fn set(&self, plan: FaultPlan) {
        self.0.set(plan);
    }

    /// Returns the current plan.
    #[must_use]
    pub fn plan(&self) -> FaultPlan {
        *self.0.get()
    }

    /// Returns a wrapper of `port` that applies the plan. The queue's number is mixed into the
    /// seed, so that each queue has its own random sequence.
    pub fn wrap<N: NetPort>(&self, port: N, stats: Arc<Stats>, queue: u64) -> Faults<N> {
        let mut faults = Faults {
            port,
            plan: SettingReader::new(&self.0),
            active: false,
            queue,
            random: 0,
            now: Duration::ZERO,
            out: VecDeque::with_capacity(UNDER_WAY),
            inward: VecDeque::with_capacity(UNDER_WAY),
            copies: Vec::with_capacity(UNDER_WAY),
            stats,
        };
        faults.begin();
        faults
    }
}

/// Port with delayed packets.
#[derive(Debug)]
pub struct Faults<N: NetPort> {
    port: N,
    plan: SettingReader<FaultPlan>,
    /// Whether the plan has any fault.
    active: bool,
    queue: u64,
    random: u64,
    now: Duration,
    /// Delayed packets sent by the guest, sorted by due time.
    out: VecDeque<UnderWay<N::Buf>>,
    inward: VecDeque<UnderWay<N::Buf>>,
    /// Addresses of the buffers that hold duplicates of received packets. They come from the port's
    /// buffers for sending, and are returned there.
    copies: Vec<usize>,
    stats: Arc<Stats>,
}

#[derive(Debug)]
struct UnderWay<B> {
    packet: Packet<B>,
    due: Duration,
}

fn add<B>(list: &mut VecDeque<UnderWay<B>>, packet: Packet<B>, due: Duration) {
    let at = list.partition_point(|other| other.due <= due);
    list.insert(at, UnderWay { packet, due });
}

impl<N: NetPort> Faults<N> {
    fn begin(&mut self) {
        let plan = *self.plan.get();
        self.active = FaultPlan { seed: 0, ..plan } != FaultPlan::default();
        self.random = plan.seed ^ self.queue.wrapping_mul(0xd6e8_feb8_6659_fd93);
    }

    /// Returns the next random number (splitmix64).
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn one_in(&mut self, of_a_million: u32) -> bool {
        of_a_million != 0 && self.random() % 1_000_000 < u64::from(of_a_million)
    }

    /// Returns the due time of a packet that is sent now.
    fn due(&mut self) -> Duration {
        let plan = *self.plan.get();
        let jitter = u64::try_from(plan.jitter.as_nanos()).unwrap_or(u64::MAX);
        let jitter = match jitter.checked_add(1) {
            Some(most) if jitter > 0 => self.random().checked_rem(most).unwrap_or(0),
            _ => 0,
        };
        let held = if self.one_in(plan.reorder) { REORDER } else { Duration::ZERO };
        let delay = plan.delay.saturating_add(Duration::from_nanos(jitter)).saturating_add(held);
        self.now.saturating_add(delay)
    }

    fn corrupt(&mut self, packet: &mut Packet<N::Buf>) {
        if !self.one_in(self.plan.get().corrupt) {
            return;
        }
        let random = self.random();
        let bytes = packet.frame_mut().get_mut(ETHERNET_HEADER..).unwrap_or_default();
        let at = random.checked_rem(bytes.len() as u64).and_then(|at| usize::try_from(at).ok());
        if let Some(byte) = at.and_then(|at| bytes.get_mut(at)) {
            *byte ^= 1_u8.rotate_left((random >> 61) as u32);
        }
    }

    /// Returns a copy of the packet in another buffer, if the packet is to be duplicated and a
    /// buffer is free.
    fn repeat(&mut self, packet: &Packet<N::Buf>) -> Option<Packet<N::Buf>> {
        if !self.one_in(self.plan.get().repeat) {
            return None;
        }
        let buf = self.port.reserve().ok()?;
        let buf = self.port.fit(buf, packet.len);
        let (len, offload) = (packet.len, packet.offload);
        let mut copy = Packet { buf, start: N::HEADROOM, len, offload };
        if copy.frame_mut().len() != len {
            self.port.unreserve(copy.buf);
            return None;
        }
        copy.frame_mut().copy_from_slice(packet.frame());
        Some(copy)
    }

    fn pass_on(&mut self, packet: Packet<N::Buf>) {
        if let Err(error) = self.port.send(packet) {
            self.stats.drop_one(error.reason());
        }
    }

    /// Sends a packet at its due time.
    fn depart(&mut self, packet: Packet<N::Buf>) {
        let due = self.due();
        if due > self.now { add(&mut self.out, packet, due) } else { self.pass_on(packet) }
    }

    /// Processes a received packet.
    fn arrive(&mut self, mut packet: Packet<N::Buf>) {
        if self.one_in(self.plan.get().lose) {
            self.stats.drop_one(DropReason::RxFault);
            return self.port.recycle(packet.buf);
        }
        self.corrupt(&mut packet);
        if let Some(copy) = self.repeat(&packet) {
            self.copies.push(place(&copy.buf));
            let due = self.due();
            add(&mut self.inward, copy, due);
        }
        let due = self.due();
        add(&mut self.inward, packet, due);
    }
}

/// Returns a buffer's address, which is unique among live buffers.
fn place(buf: &impl PacketBuf) -> usize {
    buf.bytes().as_ptr().addr()
}

impl<N: NetPort> NetPort for Faults<N> {
    type Buf = N::Buf;
    const HEADROOM: usize = N::HEADROOM;

    fn reserve(&mut self) -> Result<N::Buf, WouldBlock> {
        if self.out.len() >= UNDER_WAY { Err(WouldBlock) } else { self.port.reserve() }
    }

    fn fit(&mut self, buf: N::Buf, len: usize) -> N::Buf {
        self.port.fit(buf, len)
    }

    fn unreserve(&mut self, buf: N::Buf) {
        self.port.unreserve(buf);
    }

    fn send(&mut self, mut packet: Packet<N::Buf>) -> Result<(), PortError> {
        if !self.active {
            return self.port.send(packet);
        }
        if self.one_in(self.plan.get().lose) {
            // As on a real link, the sender gets no error.
            self.stats.drop_one(DropReason::TxFault);
            self.port.unreserve(packet.buf);
            return Ok(());
        }
        self.corrupt(&mut packet);
        let copy = self.repeat(&packet);
        self.depart(packet);
        copy.into_iter().for_each(|copy| self.depart(copy));
        Ok(())
    }

    fn receive(&mut self) -> Option<Packet<N::Buf>> {
        if !self.active && self.inward.is_empty() {
            return self.port.receive();
        }
        while self.inward.len() < UNDER_WAY
            && let Some(packet) = self.port.receive()
        {
            self.arrive(packet);
        }
        let due = self.inward.front().is_some_and(|first| first.due <= self.now);
        if due { self.inward.pop_front().map(|first| first.packet) } else { None }
    }

    fn recycle(&mut self, buf: N::Buf) {
        if !self.copies.is_empty() {
            let at = place(&buf);
            if let Some(index) = self.copies.iter().position(|copy| *copy == at) {
                self.copies.swap_remove(index);
                return self.port.unreserve(buf);
            }
        }
        self.port.recycle(buf);
    }

    fn flush(&mut self) {
        self.port.flush();
    }

    fn set_clock(&mut self, now: Duration) {
        self.now = now;
        self.port.set_clock(now);
        if self.plan.refresh() {
            self.begin();
        }
        let mut sent = false;
        while self.out.front().is_some_and(|first| first.due <= now)
            && let Some(first) = self.out.pop_front()
        {
            self.pass_on(first.packet);
            sent = true;
        }
        if sent {
            self.port.flush();
        }
    }

    fn deadline(&self) -> Option<Duration> {
        // Packets that are due already need no timer: the next `receive` returns them.
        let inward = self.inward.iter().map(|one| one.due).find(|due| *due > self.now);
        let out = self.out.front().map(|first| first.due);
        [out, inward, self.port.deadline()].into_iter().flatten().min()
    }
}

impl<N: NetPort + WaitPoint> Wrapper for Faults<N> {
    type Inner = N;

    fn inner(&mut self) -> &mut N {
        &mut self.port
    }
}
