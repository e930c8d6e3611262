//! A custom port for a NIC backend: it sends packets back.
//!
//! ```console
//! $ cargo run -p pvio-netback --example own_port
//! ```

use pvio_event_channel::EventChannel;
use pvio_grant_table::DomId;
use pvio_netback::port::{FRAME_MAX, NetPort, Packet, PortError, WouldBlock};
use pvio_netback::test_utils;
use pvio_netfront::{Checksum, Queue as Frontend};
use pvio_sim::LocalMachine;
use std::collections::VecDeque;

struct Echo(VecDeque<Packet<Box<[u8]>>>);

impl NetPort for Echo {
    type Buf = Box<[u8]>;
    const HEADROOM: usize = 0;

    /// While no buffer is free, `WouldBlock` delays the guest's packets.
    fn reserve(&mut self) -> Result<Box<[u8]>, WouldBlock> {
        if self.0.len() < 64 { Ok(vec![0; FRAME_MAX].into()) } else { Err(WouldBlock) }
    }

    fn unreserve(&mut self, _: Box<[u8]>) {}

    fn send(&mut self, packet: Packet<Box<[u8]>>) -> Result<(), PortError> {
        self.0.push_back(packet);
        Ok(())
    }

    fn receive(&mut self) -> Option<Packet<Box<[u8]>>> {
        self.0.pop_front()
    }

    fn recycle(&mut self, _: Box<[u8]>) {}

    fn flush(&mut self) {}
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (machine, driver, guest) = (LocalMachine::new(), DomId(1), DomId(2));
    let mut front = Frontend::new(&machine.domain(guest), driver)?;
    let (rings, port) = ([front.tx_gref(), front.rx_gref()], front.channel().port());
    let mut back = test_utils::connect(machine.domain(driver), guest, rings, port)?;

    let mut echo = Echo(VecDeque::new());
    front.send(&[0x5a; 60], Checksum::Unknown)?;
    front.publish()?;
    while back.poll(&mut echo, 64)?.any() {}
    assert_eq!(front.receive(|frame, _| frame == [0x5a; 60])?, Some(true));
    Ok(())
}
