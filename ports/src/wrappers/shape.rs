//! Limits of the byte and packet rate, for each direction and for all queues of a vif together, and
//! rates that several vifs [share](SharedRate).
//!
//! Nothing is dropped here. Packets that a guest sends too fast stay in its ring. Packets to the
//! guest that arrive too fast stay in the port, which drops packets when it is full, as the kernel
//! does behind a tap. A packet passes if no bucket is empty. Its full cost is then taken, and a
//! negative level delays later packets. So packets of any size pass, and the average rate is
//! correct.
#![forbid(unsafe_code)]

pub use super::shared_rate::SharedRate;

use super::shared_rate::{LIMIT_CHECK_INTERVAL, Membership, Part};
use crate::{NetPort, Packet, PortError, WouldBlock};
use alloc::sync::Arc;
use core::time::Duration;
use pvio_netback::wire::WireCost;
use pvio_runtime::{BucketRate, Setting, SettingReader, TokenBucket, WaitPoint, Wrapper};

/// Limits of one direction. `None` means no limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DirectionLimits {
    /// Bytes of Ethernet frames on the wire: every segment counts with its own headers.
    pub bytes: Option<BucketRate>,
    /// Frames on the wire: an unsegmented packet counts as its number of segments.
    pub packets: Option<BucketRate>,
}

/// Limits of a vif.
#[derive(Clone, Debug, Default)]
pub struct Shape {
    /// Direction from the guest.
    pub tx: DirectionLimits,
    /// Direction to the guest.
    pub rx: DirectionLimits,
    /// Rate that is shared with other vifs.
    pub share: Option<Arc<SharedRate>>,
}

/// Shape of a vif, shared by its queues.
#[derive(Clone, Debug)]
pub struct Shapes(Arc<Setting<Directions>>);

impl Default for Shapes {
    fn default() -> Self {
        Self(Setting::new(Directions::default()))
    }
}

/// State of both directions with their buckets; replaced when the limits change.
#[derive(Debug, Default)]
struct Directions([Option<Arc<Direction>>; 2]);

#[derive(Debug)]
struct Direction {
    limits: DirectionLimits,
    bytes: TokenBucket,
    packets: TokenBucket,
    share: Option<Arc<Membership>>,
}

impl Shapes {
    /// Replaces the shape. All buckets are full afterwards.
    pub fn set(&self, shape: &Shape) {
        let [tx, rx] = match &shape.share {
            Some(share) => share.join().map(|membership| Some(Arc::new(membership))),
            None => [None, None],
        };
        let direction = |limits: DirectionLimits, share: Option<Arc<Membership>>| {
            let (bytes, packets) = (TokenBucket::new(), TokenBucket::new());
            let any = limits != DirectionLimits::default() || share.is_some();
            any.then(|| Arc::new(Direction { limits, bytes, packets, share }))
        };
        self.0.set(Directions([direction(shape.tx, tx), direction(shape.rx, rx)]));
    }

    /// Returns a wrapper of `port` that applies the shape.
    pub fn wrap<N: NetPort>(&self, port: N) -> Shaper<N> {
        let seen = SettingReader::new(&self.0);
        let mut shaper = Shaper { port, seen, now: Duration::ZERO, tx: None, rx: None };
        shaper.begin();
        shaper
    }
}

/// Port with rate limits.
#[derive(Debug)]
pub struct Shaper<N> {
    port: N,
    seen: SettingReader<Directions>,
    now: Duration,
    tx: Option<Gate>,
    rx: Option<Gate>,
}

/// State of one queue at the limits of one direction.
#[derive(Debug)]
struct Gate {
    direction: Arc<Direction>,
    part: Option<Part>,
    /// Time until which no packet may pass.
    until: Option<Duration>,
}

impl Gate {
    fn new(direction: &Arc<Direction>) -> Self {
        let part = direction.share.as_ref().map(Part::of);
        Self { direction: Arc::clone(direction), part, until: None }
    }

    /// Starts a round.
    fn update(&mut self, now: Duration) {
        self.until = self.until.filter(|until| *until > now);
        self.part.iter_mut().for_each(|part| part.update(now));
    }

    fn is_shut(&mut self, now: Duration) -> bool {
        let Direction { limits, bytes, packets, .. } = &*self.direction;
        let by_bytes = limits.bytes.and_then(|rate| bytes.in_debt_until(rate, now));
        let by_packets = limits.packets.and_then(|rate| packets.in_debt_until(rate, now));
        let mut until = by_bytes.max(by_packets);
        if until.is_none() {
            // A queue that its own limits stop does not count as waiting for the shared rate.
            until = self.part.as_ref().and_then(|part| part.refused_until(now));
        }
        self.until = until.map(|until| until.min(now.saturating_add(LIMIT_CHECK_INTERVAL)));
        until.is_some()
    }

    fn take(&self, cost: WireCost, now: Duration) {
        let Direction { limits, bytes, packets, .. } = &*self.direction;
        limits.bytes.into_iter().for_each(|rate| bytes.take(rate, cost.bytes, now));
        limits.packets.into_iter().for_each(|rate| packets.take(rate, cost.frames, now));
        self.part.iter().for_each(|part| part.take(cost.bytes, now));
    }
}

impl<N> Shaper<N> {
    fn begin(&mut self) {
        let Directions([tx, rx]) = self.seen.get();
        (self.tx, self.rx) = (tx.as_ref().map(Gate::new), rx.as_ref().map(Gate::new));
    }
}

impl<N: NetPort> NetPort for Shaper<N> {
    type Buf = N::Buf;
    const HEADROOM: usize = N::HEADROOM;

    fn reserve(&mut self) -> Result<N::Buf, WouldBlock> {
        if self.tx.as_mut().is_some_and(|gate| gate.is_shut(self.now)) {
            return Err(WouldBlock);
        }
        self.port.reserve()
    }

    fn fit(&mut self, buf: N::Buf, len: usize) -> N::Buf {
        // Taken here and not in `send`, since packets are sent only when the whole batch is
        // complete.
        self.tx.iter().for_each(|gate| gate.take(WireCost::whole(len), self.now));
        self.port.fit(buf, len)
    }

    fn unreserve(&mut self, buf: N::Buf) {
        self.port.unreserve(buf);
    }

    fn send(&mut self, packet: Packet<N::Buf>) -> Result<(), PortError> {
        if let Some(gate) = self.tx.as_ref().filter(|_| packet.offload.gso.is_some()) {
            // The number of segments is known only now.
            let cost = WireCost::of(packet.frame(), packet.offload.gso);
            gate.take(cost.beyond(WireCost::whole(packet.len)), self.now);
        }
        self.port.send(packet)
    }

    fn receive(&mut self) -> Option<Packet<N::Buf>> {
        let Some(gate) = &mut self.rx else { return self.port.receive() };
        if gate.is_shut(self.now) {
            return None;
        }
        let packet = self.port.receive()?;
        gate.take(WireCost::of(packet.frame(), packet.offload.gso), self.now);
        Some(packet)
    }

    fn recycle(&mut self, buf: N::Buf) {
        self.port.recycle(buf);
    }

    fn flush(&mut self) {
        self.port.flush();
    }

    fn set_clock(&mut self, now: Duration) {
        self.now = now;
        if self.seen.refresh() {
            self.begin();
        }
        self.tx.iter_mut().chain(&mut self.rx).for_each(|gate| gate.update(self.now));
        self.port.set_clock(now);
    }

    fn deadline(&self) -> Option<Duration> {
        let gates = self.tx.iter().chain(&self.rx);
        let own = gates.filter_map(|gate| gate.until);
        own.chain(self.port.deadline()).min()
    }
}

impl<N: WaitPoint> Wrapper for Shaper<N> {
    type Inner = N;

    fn inner(&mut self) -> &mut N {
        &mut self.port
    }
}
