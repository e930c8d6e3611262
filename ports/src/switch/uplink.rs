//! A tap as a member of a switch: the connection to external networks, by routing or a bridge.
#![forbid(unsafe_code)]

use super::{Lane, Socket, Switch};
use crate::tap::{Tap, TapPort};
use crate::wait::{Wait, Watch};
use crate::{NetPort, Packet, PacketBuf};
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, Ordering};
use pvio_netback::stats::Stats;
use std::io::{self, PipeWriter};
use std::sync::mpsc::sync_channel;
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

/// Limit of packets moved in each direction per round.
const BATCH: usize = 64;

/// Running uplink; dropping it stops it.
#[derive(Debug)]
pub struct Uplink {
    thread: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    wake: Option<PipeWriter>,
    stats: Arc<Stats>,
}

impl Uplink {
    /// Connects a tap to a switch, on a thread of that name.
    ///
    /// # Errors
    /// An error of the system if it has no thread, descriptor or io_uring available.
    pub fn start(name: &str, switch: &Arc<Switch>, tap: Tap) -> io::Result<Self> {
        tap.set_unsegmented(true, true).map_err(io::Error::other)?;
        let socket = switch.join(1, (true, true))?;
        let stats = Arc::new(Stats::default());
        let (counts, stop) = (Arc::clone(&stats), Arc::new(AtomicBool::new(false)));
        let (woken, wake) = io::pipe()?;
        let (stopped, (ready, made)) = (Arc::clone(&stop), sync_channel(1));
        let (joined, stopping) = (Arc::clone(switch), Arc::clone(&stop));
        let thread = Builder::new().name(name.into()).spawn(move || {
            let mut moving = match Moving::new(&socket, tap, &counts) {
                Ok(moving) => moving,
                Err(error) => return drop(ready.send(Err(error))),
            };
            moving.tap.watch(woken.into());
            let _ = ready.send(Ok(()));
            let _ends = Ends { switch: joined, stop: stopping };
            if let Err(error) = moving.run(&stopped) {
                tracing::warn!(%error, "an uplink has ended");
            }
        })?;
        let made = made.recv().unwrap_or_else(|_| Err(io::Error::other("it ended at once")));
        let uplink = Self { thread: Some(thread), stop, wake: Some(wake), stats };
        made.map(|()| uplink)
    }

    /// Returns the counters of packets lost between the tap and the switch.
    #[must_use]
    pub fn stats(&self) -> &Stats {
        &self.stats
    }
}

impl Drop for Uplink {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        drop(self.wake.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("an uplink panicked");
        }
    }
}

/// Notifies the switch when the thread ends on its own, including by a panic.
struct Ends {
    switch: Arc<Switch>,
    stop: Arc<AtomicBool>,
}

impl Drop for Ends {
    fn drop(&mut self) {
        if !self.stop.load(Ordering::Acquire) {
            tracing::error!("an uplink has ended: the NICs of its switch are closed");
            self.switch.lose_uplink();
        }
    }
}

struct Moving {
    tap: TapPort,
    lane: Lane,
    bell: Option<Watch>,
}

impl Moving {
    fn new(socket: &Socket, tap: Tap, stats: &Arc<Stats>) -> io::Result<Self> {
        let lane = Lane::new(socket.end(0)?, stats);
        let mut tap = TapPort::new(tap, Arc::clone(stats))?;
        let bell = tap.watch(lane.inbox().bell().try_clone()?);
        Ok(Self { tap, lane, bell })
    }

    fn run(&mut self, stop: &AtomicBool) -> io::Result<()> {
        let begin = Instant::now();
        while !stop.load(Ordering::Acquire) {
            self.tap.turn(begin.elapsed());
            self.tap.pump()?;
            if self.bell.is_some_and(|bell| self.tap.fired(bell)) {
                self.lane.inbox().silence();
            }
            self.lane.turn(begin.elapsed());
            let inward = transfer(&mut self.tap, &mut self.lane);
            let outward = transfer(&mut self.lane, &mut self.tap);
            if outward > 0 {
                self.tap.flush();
            }
            if inward == 0 && outward == 0 {
                if self.lane.may_sleep() {
                    let until = self.tap.deadline();
                    self.tap.wait(until.map(|until| until.saturating_sub(begin.elapsed())))?;
                }
                self.lane.inbox().awake();
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
