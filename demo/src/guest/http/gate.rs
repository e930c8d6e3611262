//! Drops connection requests while no socket is listening: the TCP stack would respond with a
//! reset. The client's kernel sends a dropped SYN again.

use smoltcp::phy::{Device, DeviceCapabilities, RxToken};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, TcpPacket};

/// A device that drops SYN frames for which there is no listening socket.
pub struct Gate<'d, D> {
    /// The device.
    pub device: &'d mut D,
    /// The port that is served.
    pub port: u16,
    /// Number of listening sockets that have not yet received a SYN.
    pub listening: usize,
}

/// A received frame.
pub struct Frame<'g, T> {
    token: T,
    port: u16,
    listening: &'g mut usize,
}

impl<D: Device> Device for Gate<'_, D> {
    type RxToken<'a>
        = Frame<'a, D::RxToken<'a>>
    where
        Self: 'a;
    type TxToken<'a>
        = D::TxToken<'a>
    where
        Self: 'a;

    fn receive(&mut self, now: Instant) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        let (token, answer) = self.device.receive(now)?;
        Some((Frame { token, port: self.port, listening: &mut self.listening }, answer))
    }

    fn transmit(&mut self, now: Instant) -> Option<Self::TxToken<'_>> {
        self.device.transmit(now)
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.device.capabilities()
    }
}

impl<T: RxToken> RxToken for Frame<'_, T> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        let Self { token, port, listening } = self;
        token.consume(|frame| {
            if !asks_for_connection(frame, port) {
                return read(frame);
            }
            match listening.checked_sub(1) {
                Some(left) => {
                    *listening = left;
                    read(frame)
                }
                // The stack must consume something; an empty frame is ignored.
                None => read(&[]),
            }
        })
    }
}

/// Returns whether a frame is the SYN of a TCP connection to this port.
fn asks_for_connection(frame: &[u8], port: u16) -> bool {
    let Ok(frame) = EthernetFrame::new_checked(frame) else { return false };
    if frame.ethertype() != EthernetProtocol::Ipv4 {
        return false;
    }
    let Ok(packet) = Ipv4Packet::new_checked(frame.payload()) else { return false };
    if packet.next_header() != IpProtocol::Tcp {
        return false;
    }
    TcpPacket::new_checked(packet.payload())
        .is_ok_and(|tcp| tcp.syn() && !tcp.ack() && tcp.dst_port() == port)
}
