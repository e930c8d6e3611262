//! A tap as a member of a switch: the connection to external networks, by routing or a bridge.
#![forbid(unsafe_code)]

use super::{Switch, SwitchMembership, SwitchQueue};
use crate::queue_port::PacketQueue;
use crate::tap::{Tap, TapPort};
use crate::wait::WaitPort;
use crate::{NetPort, Packet, PacketBuf};
use alloc::sync::Arc;
use pvio_netback::stats::Stats;
use pvio_ring::error::Report;
use pvio_runtime::{StopFlag, WaitPoint, Watch, Worker, monotonic};
use std::io;

/// Limit of packets moved in each direction per round.
const BATCH: usize = 64;

/// Running uplink; dropping it stops it.
#[derive(Debug)]
pub struct Uplink {
    _worker: Worker<()>,
    stats: Arc<Stats>,
}

impl Uplink {
    /// Connects a tap to a switch, on a thread of that name.
    ///
    /// # Errors
    /// An error of the system if it has no thread, descriptor or io_uring available.
    pub fn start(name: &str, switch: &Arc<Switch>, tap: Tap) -> io::Result<Self> {
        let failed = |error| io::Error::other(alloc::format!("{}", Report(&error)));
        tap.set_unsegmented(true, true).map_err(failed)?;
        let membership = switch.join(1, (true, true))?;
        let stats = Arc::new(Stats::default());
        let (counts, switch) = (Arc::clone(&stats), Arc::clone(switch));
        let start = move |stopped| {
            let mut moving = Moving::new(&membership, tap, &counts)?;
            moving.tap.watch(stopped)?;
            // The switch's member leaves when the thread ends.
            Ok((moving, membership))
        };
        let serve = move |(mut moving, _membership): (Moving, SwitchMembership),
                          stop: &StopFlag| {
            let _ends = Ends { switch, stop: stop.clone() };
            let outcome = moving.run(stop);
            outcome.map_err(|error| tracing::warn!(%error, "an uplink failed"))
        };
        let mut worker = Worker::spawn(name, Arc::new(|| ()), (), start, serve)?;
        worker.wait_ready()?;
        Ok(Self { _worker: worker, stats })
    }

    /// Returns the counters of packets lost between the tap and the switch.
    #[must_use]
    pub fn stats(&self) -> &Stats {
        &self.stats
    }
}

/// Notifies the switch when the thread ends on its own, including by a panic.
struct Ends {
    switch: Arc<Switch>,
    stop: StopFlag,
}

impl Drop for Ends {
    fn drop(&mut self) {
        if !self.stop.is_set() {
            let panicked = std::thread::panicking();
            tracing::error!(panicked, "an uplink ended: the NICs of its switch are closed");
            self.switch.lose_uplink();
        }
    }
}

struct Moving {
    tap: TapPort,
    queue: SwitchQueue,
    arrived: Watch,
}

impl Moving {
    fn new(membership: &SwitchMembership, tap: Tap, stats: &Arc<Stats>) -> io::Result<Self> {
        let queue = SwitchQueue::new(membership.queue(0)?, stats);
        let mut tap = TapPort::new(tap, Arc::clone(stats))?;
        let arrived = tap.watch(queue.arrivals().to_fd()?)?;
        Ok(Self { tap, queue, arrived })
    }

    fn run(&mut self, stop: &StopFlag) -> io::Result<()> {
        while !stop.is_set() {
            self.tap.set_clock(monotonic());
            self.tap.poll()?;
            if self.tap.fired(self.arrived) {
                self.queue.arrivals().clear();
            }
            self.queue.set_clock(monotonic());
            let inward = transfer(&mut self.tap, &mut self.queue);
            let outward = transfer(&mut self.queue, &mut self.tap);
            if outward > 0 {
                self.tap.flush();
            }
            if inward == 0 && outward == 0 {
                if self.queue.may_sleep() {
                    let deadline = self.tap.deadline();
                    self.tap.wait(deadline.map(|time| time.saturating_sub(monotonic())))?;
                }
                self.queue.awake();
            }
        }
        Ok(())
    }
}

/// Moves packets from one port to another while the destination has buffers. Other packets stay in
/// the source, which drops packets when it is full.
fn transfer<A: NetPort, B: NetPort>(from: &mut A, to: &mut B) -> usize {
    let mut count = 0;
    while count < BATCH
        && let Ok(space) = to.reserve()
    {
        let Some(packet) = from.receive() else {
            to.unreserve(space);
            break;
        };
        count = count.saturating_add(1);
        let mut space = to.fit(space, packet.len);
        let end = B::HEADROOM.saturating_add(packet.len);
        let Some(frame) = space.bytes_mut().get_mut(B::HEADROOM..end) else {
            to.unreserve(space);
            from.recycle(packet.buf);
            continue;
        };
        frame.copy_from_slice(packet.frame());
        let (len, offload) = (packet.len, packet.offload);
        from.recycle(packet.buf);
        // The port that loses a packet counts it.
        let _ = to.send(Packet { buf: space, start: B::HEADROOM, len, offload });
    }
    count
}
