//! Two queues that are connected by a switch of this process, one of them behind a capture.
//!
//! ```console
//! $ cargo run -p pvio-ports --example switch
//! ```

use pvio_netback::Stats;
use pvio_ports::switch::{Switch, SwitchPort};
use pvio_ports::wrappers::capture::{Probe, SNAPLEN};
use pvio_ports::{NetPort, Offload, Packet, PacketBuf};
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

const LEFT: [u8; 6] = [2, 0, 0, 0, 0, 1];
const RIGHT: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Sends a packet, as a queue does for its guest.
fn send(port: &mut impl NetPort, to: [u8; 6], from: [u8; 6]) -> Result<(), Box<dyn Error>> {
    let frame = [&to[..], &from, &[0x88, 0xb5], &[7; 46]].concat();
    let buf = port.reserve()?;
    let mut buf = port.fit(buf, frame.len());
    buf.bytes_mut()[..frame.len()].copy_from_slice(&frame);
    port.send(Packet { buf, start: 0, len: frame.len(), offload: Offload::default() })?;
    port.flush();
    Ok(())
}

/// Receives a packet and returns its sender.
fn receive(port: &mut impl NetPort) -> Option<[u8; 6]> {
    let packet = port.receive()?;
    let sender = packet.frame()[6..12].try_into().ok();
    port.recycle(packet.buf);
    sender
}

fn main() -> Result<(), Box<dyn Error>> {
    let (switch, stats) = (Switch::new(), Arc::new(Stats::default()));
    // Members with one queue each, which accept packets that are not segmented yet.
    let (left, right) = (switch.join(1, (true, true))?, switch.join(1, (true, true))?);
    let probe = Probe::default();
    let capture = probe.open(SNAPLEN)?;
    let mut left = probe.wrap(SwitchPort::new(left.queue(0)?, &stats)?);
    let mut right = SwitchPort::new(right.queue(0)?, &stats)?;

    send(&mut left, [0xff; 6], LEFT)?;
    assert_eq!(receive(&mut right), Some(LEFT), "a broadcast, which shows where LEFT is");
    send(&mut right, LEFT, RIGHT)?;
    assert_eq!(receive(&mut left), Some(RIGHT));
    let mut captured = 0..;
    capture.read(Duration::ZERO, |_| Ok(captured.next().is_some()))?;
    assert_eq!(captured.start, 2, "one sent, one received");
    Ok(())
}
