//! Protocol between a domain and the hypervisor, on `hypervisor.sock` and on the sockets of device
//! connections: packets of 16 bytes in both directions, little-endian. Replies may have descriptors
//! attached.
//!
//! | request | bytes | reply |
//! |---|---|---|
//! | magic | 0..4 | magic |
//! | operation | 4..6 | status |
//! | domain | 6..8 | 0 |
//! | port | 8..12 | first result |
//! | 0; of a device, whether ports follow | 12..16 | second result |
//! | of a device, its ports, 4 bytes each | 16.. | |

use pvio_event_channel::Port;
use pvio_grant_table::DomId;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Size of a reply and of most requests in bytes.
pub(crate) const LEN: usize = size_of::<Message>();
/// Largest number of ports that a request lists.
pub(crate) const MAX_LISTED: usize = 1024;
/// Largest size of a request in bytes.
pub(crate) const MAX_LEN: usize = LEN + MAX_LISTED * 4;
/// "PVH2": pvio, hosted, version 2 of this protocol.
const MAGIC: [u8; 4] = *b"PVH2";

/// A request or a reply.
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
struct Message {
    magic: [u8; 4],
    operation_or_status: U16,
    /// 0 in a reply.
    domain: U16,
    /// Of a request, the port; of a reply, its first result.
    first: U32,
    /// Of a request, 0; of a reply, its second result.
    second: U32,
}

/// What a device connection may reach.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Scope {
    /// The only domain whose memory it gets and whose ports it binds.
    pub(crate) frontend: DomId,
    /// Limit of open ports.
    pub(crate) channels: u32,
    /// Ports of the frontend that it may bind; `None` for all that this domain may bind.
    pub(crate) ports: Option<Vec<Port>>,
}

/// Request of a domain.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Request {
    /// Join as this domain. Reply: total frames, grant frames; memory file.
    Join(DomId),
    /// Get the memory of a domain that has granted this domain a page. Reply: as for `Join`; memory
    /// file, file of the uses of its grants.
    Memory(DomId),
    /// Allocate a port that this domain may bind to. Reply: port, index of the end; own and the
    /// other's eventfd, channel file.
    AllocUnbound(DomId),
    /// Bind to this port of this domain. Reply: as for `AllocUnbound`.
    Bind(DomId, Port),
    /// Close a port.
    Close(Port),
    /// Create a connection for a device process. Reply: its socket.
    Device(Scope),
    /// Connect to xenstore. Reply: a connected stream.
    Xenstore,
}

/// Error: not a message of this protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Nonsense;

impl Request {
    /// Returns the encoded request.
    pub(crate) fn to_wire(&self) -> Vec<u8> {
        let (op, domain, port) = match *self {
            Self::Join(domain) => (1_u16, domain, Port(0)),
            Self::Memory(domain) => (2, domain, Port(0)),
            Self::AllocUnbound(domain) => (3, domain, Port(0)),
            Self::Bind(domain, port) => (4, domain, port),
            Self::Close(port) => (5, DomId(0), port),
            Self::Device(ref scope) => return scope.to_wire(),
            Self::Xenstore => (7, DomId(0), Port(0)),
        };
        pack(op, domain.0, port.0, 0).into()
    }

    /// Decodes a request. Every field that an operation does not use must be 0, a domain id must be
    /// valid, and a port must not be 0.
    pub(crate) fn from_wire(bytes: &[u8]) -> Result<Self, Nonsense> {
        let (message, ports) = bytes.split_at_checked(LEN).ok_or(Nonsense)?;
        let (op, domain, port, rest) = unpack(message)?;
        if op == DEVICE {
            return Scope::from_wire(DomId(domain), port, rest, ports).map(Self::Device);
        }
        if !ports.is_empty() {
            return Err(Nonsense);
        }
        let (domain, port) = (DomId(domain), Port(port));
        if rest != 0 || !domain.is_real() {
            return Err(Nonsense);
        }
        match (op, domain.0, port.0) {
            (1, _, 0) => Ok(Self::Join(domain)),
            (2, _, 0) => Ok(Self::Memory(domain)),
            (3, _, 0) => Ok(Self::AllocUnbound(domain)),
            (4, _, 1..) => Ok(Self::Bind(domain, port)),
            (5, 0, 1..) => Ok(Self::Close(port)),
            (7, 0, 0) => Ok(Self::Xenstore),
            _ => Err(Nonsense),
        }
    }
}

/// Operation of [`Request::Device`].
const DEVICE: u16 = 6;

impl Scope {
    fn to_wire(&self) -> Vec<u8> {
        let listed = u32::from(self.ports.is_some());
        let mut bytes: Vec<u8> = pack(DEVICE, self.frontend.0, self.channels, listed).into();
        let ports = self.ports.iter().flatten();
        bytes.extend(ports.flat_map(|port| port.0.to_le_bytes()));
        bytes
    }

    fn from_wire(
        frontend: DomId,
        channels: u32,
        listed: u32,
        ports: &[u8],
    ) -> Result<Self, Nonsense> {
        let (listed_ports, rest) = ports.as_chunks::<4>();
        let counts = rest.is_empty() && listed_ports.len() <= MAX_LISTED;
        if !frontend.is_real() || listed > 1 || !counts || (listed == 0 && !ports.is_empty()) {
            return Err(Nonsense);
        }
        let port = |bytes: &[u8; 4]| Port(u32::from_le_bytes(*bytes));
        let ports = (listed == 1).then(|| listed_ports.iter().map(port).collect());
        Ok(Self { frontend, channels, ports })
    }

    /// Whether this port of the frontend may be bound.
    pub(crate) fn permits(&self, port: Port) -> bool {
        self.ports.as_ref().is_none_or(|ports| ports.contains(&port))
    }
}

/// Status of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub(crate) enum Status {
    /// Success.
    Done = 0,
    /// There is no such domain.
    NoDomain = 1,
    /// A process has joined as this domain already.
    Taken = 2,
    /// The domain's limit of ports is reached.
    NoPorts = 3,
    /// The domain may not bind or close this port.
    BadPort = 4,
    /// The other domain has granted this one no page.
    NothingGranted = 5,
    /// The hypervisor is out of descriptors or memory.
    NoResources = 6,
    /// This connection is for a device of another domain.
    Denied = 7,
}

/// Reply of the hypervisor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Reply {
    /// Status of the request.
    pub(crate) status: Status,
    /// Two values whose meaning depends on the request; 0 unless it succeeded.
    pub(crate) results: [u32; 2],
}

impl Reply {
    /// Returns the encoded reply.
    pub(crate) fn to_wire(self) -> [u8; LEN] {
        pack(self.status as u16, 0, self.results[0], self.results[1])
    }

    /// Decodes a reply.
    pub(crate) fn from_wire(bytes: &[u8]) -> Result<Self, Nonsense> {
        let (status, zero, first, second) = unpack(bytes)?;
        let status = match (status, zero) {
            (0, 0) => Status::Done,
            (1, 0) => Status::NoDomain,
            (2, 0) => Status::Taken,
            (3, 0) => Status::NoPorts,
            (4, 0) => Status::BadPort,
            (5, 0) => Status::NothingGranted,
            (6, 0) => Status::NoResources,
            (7, 0) => Status::Denied,
            _ => return Err(Nonsense),
        };
        Ok(Self { status, results: [first, second] })
    }
}

impl From<Status> for Reply {
    fn from(status: Status) -> Self {
        Self { status, results: [0; 2] }
    }
}

fn pack(operation_or_status: u16, domain: u16, first: u32, second: u32) -> [u8; LEN] {
    zerocopy::transmute!(Message {
        magic: MAGIC,
        operation_or_status: operation_or_status.into(),
        domain: domain.into(),
        first: first.into(),
        second: second.into(),
    })
}

fn unpack(bytes: &[u8]) -> Result<(u16, u16, u32, u32), Nonsense> {
    let message = Message::ref_from_bytes(bytes).map_err(|_| Nonsense)?;
    if message.magic != MAGIC {
        return Err(Nonsense);
    }
    let Message { operation_or_status, domain, first, second, .. } = message;
    Ok((operation_or_status.get(), domain.get(), first.get(), second.get()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_round_trip() {
        for request in [
            Request::Join(DomId(0x7fef)),
            Request::Memory(DomId(1)),
            Request::AllocUnbound(DomId(0)),
            Request::Bind(DomId(7), Port(u32::MAX)),
            Request::Close(Port(4095)),
            Request::Xenstore,
            Request::Device(Scope { frontend: DomId(3), channels: 9, ports: None }),
            Request::Device(Scope { frontend: DomId(3), channels: 0, ports: Some(vec![]) }),
            Request::Device(Scope {
                frontend: DomId(0),
                channels: 2,
                ports: Some(vec![Port(1), Port(u32::MAX)]),
            }),
        ] {
            assert_eq!(Request::from_wire(&request.to_wire()), Ok(request));
        }
    }

    #[test]
    fn malformed_request_bytes_are_rejected() {
        let good = Request::Close(Port(5)).to_wire();
        for (at, byte) in [(0, 0), (4, 0), (4, 8), (5, 1), (6, 1), (8, 0), (12, 1)] {
            let mut bad = good.clone();
            bad[at] = byte;
            assert_eq!(Request::from_wire(&bad), Err(Nonsense), "byte {at} = {byte}");
        }
        let long = [good.clone(), vec![0; 4]].concat();
        assert_eq!(Request::from_wire(&long), Err(Nonsense), "a port to close");
        let device = |listed, ports: usize| {
            let head: Vec<u8> = pack(6, 1, 1, listed).into();
            Request::from_wire(&[head, vec![1; ports]].concat())
        };
        for (listed, ports) in [(0, 4), (1, 3), (2, 4), (1, 4 * MAX_LISTED + 4)] {
            assert_eq!(device(listed, ports), Err(Nonsense), "{listed} {ports}");
        }
        assert!(device(1, 4 * MAX_LISTED).is_ok());
        assert_eq!(Request::from_wire(&good[..15]), Err(Nonsense));
        assert_eq!(Request::from_wire(&pack(1, 0x7ff0, 0, 0)), Err(Nonsense), "reserved domain");
        assert_eq!(Request::from_wire(&pack(1, 1, 1, 0)), Err(Nonsense), "a port to join");
    }

    #[test]
    fn replies_round_trip() {
        let reply = Reply { status: Status::Done, results: [7, u32::MAX] };
        assert_eq!(Reply::from_wire(&reply.to_wire()), Ok(reply));
        let reply = Reply::from(Status::NoResources);
        assert_eq!(Reply::from_wire(&reply.to_wire()), Ok(reply));
        assert_eq!(Reply::from_wire(&pack(8, 0, 0, 0)), Err(Nonsense));
    }
}
