//! Keeps a client waiting while every socket is taken: the stack would refuse it with a reset. A request
//! for a connection that is dropped is sent again by the client's kernel.

use smoltcp::phy::{Device, DeviceCapabilities, RxToken};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, TcpPacket};

/// A device whose frames pass unless they ask for a connection that nobody can take.
pub struct Gate<'d, D> {
    /// The device.
    pub device: &'d mut D,
    /// The port that is served.
    pub port: u16,
    /// Sockets that listen and have not been asked yet.
    pub listening: usize,
}

/// A frame that came.
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
                // The stack has to be given something: a frame of no bytes is none.
                None => read(&[]),
            }
        })
    }
}

/// Whether a frame is the first of a TCP connection to this port.
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
