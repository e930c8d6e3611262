//! Protocol between a domain and the hypervisor on `hypervisor.sock`: packets of 16 bytes in both
//! directions, little-endian. Replies may have descriptors attached.
//!
//! | request | bytes | reply |
//! |---|---|---|
//! | magic | 0..4 | magic |
//! | operation | 4..6 | status |
//! | domain | 6..8 | 0 |
//! | port | 8..12 | first result |
//! | 0 | 12..16 | second result |

use pvio_event_channel::Port;
use pvio_grant_table::DomId;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Size of a request and of a reply in bytes.
pub(crate) const LEN: usize = size_of::<Message>();
/// "PVH1": pvio, hosted, version 1 of this protocol.
const MAGIC: [u8; 4] = *b"PVH1";

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

/// Request of a domain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Request {
    /// Join as this domain. Reply: total frames, grant frames; memory and events files.
    Join(DomId),
    /// Get the memory of a domain that has granted this domain a page. Reply: as for `Join`, memory
    /// only.
    Memory(DomId),
    /// Allocate a port that this domain may bind to. Reply: port; own and the other's eventfd, the
    /// other's events file.
    AllocUnbound(DomId),
    /// Bind to this port of this domain. Reply: as for `AllocUnbound`.
    Bind(DomId, Port),
    /// Close a port.
    Close(Port),
    /// Wake the current owner of this port of this domain.
    Kick(DomId, Port),
    /// Connect to xenstore. Reply: a connected stream.
    Xenstore,
}

/// Error: not a message of this protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Nonsense;

impl Request {
    /// Returns the encoded request.
    pub(crate) fn to_wire(self) -> [u8; LEN] {
        let (op, domain, port) = match self {
            Self::Join(domain) => (1_u16, domain, Port(0)),
            Self::Memory(domain) => (2, domain, Port(0)),
            Self::AllocUnbound(domain) => (3, domain, Port(0)),
            Self::Bind(domain, port) => (4, domain, port),
            Self::Close(port) => (5, DomId(0), port),
            Self::Kick(domain, port) => (6, domain, port),
            Self::Xenstore => (7, DomId(0), Port(0)),
        };
        pack(op, domain.0, port.0, 0)
    }

    /// Decodes a request. Every field that an operation does not use must be 0, a domain id must be
    /// valid, and a port must not be 0.
    pub(crate) fn from_wire(bytes: &[u8]) -> Result<Self, Nonsense> {
        let (op, domain, port, rest) = unpack(bytes)?;
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
            (6, _, 1..) => Ok(Self::Kick(domain, port)),
            (7, 0, 0) => Ok(Self::Xenstore),
            _ => Err(Nonsense),
        }
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
    /// The domain may not bind, close or kick this port.
    BadPort = 4,
    /// The other domain has granted this one no page.
    NothingGranted = 5,
    /// The hypervisor is out of descriptors or memory.
    NoResources = 6,
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
            Request::Kick(DomId(3), Port(1)),
            Request::Xenstore,
        ] {
            assert_eq!(Request::from_wire(&request.to_wire()), Ok(request));
        }
    }

    #[test]
    fn malformed_request_bytes_are_rejected() {
        let good = Request::Close(Port(5)).to_wire();
        for (at, byte) in [(0, 0), (4, 0), (4, 8), (5, 1), (6, 1), (8, 0), (12, 1)] {
            let mut bad = good;
            bad[at] = byte;
            assert_eq!(Request::from_wire(&bad), Err(Nonsense), "byte {at} = {byte}");
        }
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
        assert_eq!(Reply::from_wire(&pack(7, 0, 0, 0)), Err(Nonsense));
    }
}
