//! TCP frames, built and parsed without a network stack.

use pvio_ring::proto::checksum::Transport;

/// MAC address of the kernel's side of a link.
pub const HOST_MAC: [u8; 6] = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff];
/// MAC address that no station has.
pub const NOBODY: [u8; 6] = [2, 0, 0, 0, 0, 9];

pub const SYN: u8 = 2;
pub const PUSH: u8 = 8;
pub const ACK: u8 = 16;

/// One TCP segment from one station to another; [`bytes`](Self::bytes) returns the frame.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    pub macs: ([u8; 6], [u8; 6]),
    pub v6: bool,
    /// Last byte of each end's address: 192.0.2.x or fd00::x.
    pub hosts: (u8, u8),
    pub ports: (u16, u16),
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub data: &'a [u8],
}

impl Segment<'_> {
    /// Returns the frame with a blank checksum (the sum of the pseudo-header only).
    pub fn bytes(&self) -> Vec<u8> {
        let mut f = [self.macs.1, self.macs.0].concat();
        let tcp_len = 20 + self.data.len();
        if self.v6 {
            f.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            f.extend((tcp_len as u16).to_be_bytes());
            f.extend([6, 64]);
            for host in [self.hosts.0, self.hosts.1] {
                f.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, host]);
            }
        } else {
            let ip = f.len() + 2;
            f.extend([8, 0, 0x45, 0]);
            f.extend((20 + tcp_len as u16).to_be_bytes());
            f.extend([
                0,
                7,
                0x40,
                0,
                64,
                6,
                0,
                0,
                192,
                0,
                2,
                self.hosts.0,
                192,
                0,
                2,
                self.hosts.1,
            ]);
            let sum =
                f[ip..].chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum::<u32>();
            let sum = (sum & 0xffff) + (sum >> 16);
            let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
            f[ip + 10..ip + 12].copy_from_slice(&sum.to_be_bytes());
        }
        f.extend(self.ports.0.to_be_bytes());
        f.extend(self.ports.1.to_be_bytes());
        f.extend(self.seq.to_be_bytes());
        f.extend(self.ack.to_be_bytes());
        f.extend([0x50, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        f.extend(self.data);
        Transport::of(&f).unwrap().blank(&mut f);
        f
    }
}

/// Returns the sequence and acknowledgement numbers, flags and data of a TCP frame, or `None` for
/// another frame.
pub fn parse(frame: &[u8]) -> Option<(u32, u32, u8, &[u8])> {
    let t = Transport::of(frame).ok().filter(|t| !t.udp)?;
    let tcp = &frame[t.start..t.end];
    let word = |at: usize| u32::from_be_bytes(tcp[at..at + 4].try_into().unwrap());
    Some((word(4), word(8), tcp[13], &tcp[usize::from(tcp[12] >> 4) * 4..]))
}

/// Returns the destination port of a TCP frame.
pub fn to_port(frame: &[u8]) -> Option<u16> {
    let t = Transport::of(frame).ok().filter(|t| !t.udp)?;
    Some(u16::from_be_bytes(frame[t.start + 2..t.start + 4].try_into().unwrap()))
}

/// Whether the checksum is correct or, with `blank`, correctly left blank.
pub fn checksum_holds(frame: &[u8], blank: bool) -> bool {
    let t = Transport::of(frame).unwrap();
    let at = t.start + t.offset;
    if blank { frame[at..at + 2] == t.pseudo_sum.to_be_bytes() } else { t.verify(frame) }
}

/// Returns bytes that depend on their position.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 251) as u8).collect()
}
