//! A custom port for a NIC backend: it echoes packets and counts them.
//!
//! ```console
//! $ cargo run -p pvio-netback --example own_port
//! ```

use pvio_event_channel::EventChannel;
use pvio_grant_table::DomId;
use pvio_netback::port::{FRAME_MAX, NetPort, Packet, PortError, WouldBlock};
use pvio_netback::queue::{EventPorts, QueueRefs};
use pvio_netback::{Features, Queue};
use pvio_netfront::{Checksum, Queue as Frontend};
use pvio_sim::LocalMachine;
use std::collections::VecDeque;
use std::error::Error;

#[derive(Default)]
struct Echo {
    waiting: VecDeque<Packet<Box<[u8]>>>,
    packets: u64,
}

impl NetPort for Echo {
    type Buf = Box<[u8]>;
    const HEADROOM: usize = 0;

    /// While no buffer is free, `WouldBlock` delays the guest's packets.
    fn reserve(&mut self) -> Result<Box<[u8]>, WouldBlock> {
        if self.waiting.len() < 64 { Ok(vec![0; FRAME_MAX].into()) } else { Err(WouldBlock) }
    }

    fn unreserve(&mut self, _: Box<[u8]>) {}

    fn send(&mut self, packet: Packet<Box<[u8]>>) -> Result<(), PortError> {
        self.packets += 1;
        self.waiting.push_back(packet);
        Ok(())
    }

    fn receive(&mut self) -> Option<Packet<Box<[u8]>>> {
        self.waiting.pop_front()
    }

    fn recycle(&mut self, _: Box<[u8]>) {}

    fn flush(&mut self) {}
}

fn main() -> Result<(), Box<dyn Error>> {
    let (machine, driver, guest) = (LocalMachine::new(), DomId(1), DomId(2));
    let mut front = Frontend::new(&machine.domain(guest), driver)?;
    let events = EventPorts::Shared(front.channel().port());
    let refs = QueueRefs { tx_ring: front.tx_gref(), rx_ring: front.rx_gref(), events };
    let platform = machine.domain(driver);
    let mut back = Queue::attach(platform, guest, &refs, Features::LEAST, Default::default())?;

    let mut port = Echo::default();
    front.send(&[0x5a; 60], Checksum::Unknown)?;
    front.publish()?;
    while back.poll(&mut port, 64)?.any() {}
    assert_eq!(front.receive(|frame, _| frame == [0x5a; 60])?, Some(true));
    assert_eq!(port.packets, 1);
    Ok(())
}
