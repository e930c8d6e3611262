use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, transmute};

use super::{Op, PAYLOAD_MAX};

/// The length of a [`Header`] on the wire, in bytes (`sizeof(struct xsd_sockmsg)`).
pub const HEADER_LEN: usize = 16;

/// The header before each payload (`struct xsd_sockmsg`): four little-endian words.
///
/// `kind` remains a raw number, because a server must reply to an unknown one (with `ENOSYS`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Header {
    /// The operation's code; see [`Header::op`].
    pub kind: u32,
    /// Chosen by the caller, returned in the response; 0 in an event.
    pub req_id: u32,
    /// The transaction that the message belongs to, 0 for none.
    pub tx_id: u32,
    /// The payload's length in bytes, at most [`PAYLOAD_MAX`].
    pub len: u32,
}

impl Header {
    /// Creates a header for `len` bytes of payload.
    ///
    /// # Errors
    /// [`FrameError::Oversize`] if `len` exceeds [`PAYLOAD_MAX`].
    pub fn new(op: Op, req_id: u32, tx_id: u32, len: usize) -> Result<Self, FrameError> {
        let len = checked_len(len)?;
        Ok(Self { kind: op.code(), req_id, tx_id, len })
    }

    /// Returns the operation, if the code is valid.
    #[must_use]
    pub const fn op(&self) -> Option<Op> {
        Op::from_code(self.kind)
    }

    /// Decodes the four words; any bytes make a header, whose length may still be too large.
    #[must_use]
    pub fn parse(bytes: [u8; HEADER_LEN]) -> Self {
        let words: SockMsg = transmute!(bytes);
        Self {
            kind: words.kind.get(),
            req_id: words.req_id.get(),
            tx_id: words.tx_id.get(),
            len: words.len.get(),
        }
    }

    /// Returns the header as encoded on the wire.
    #[must_use]
    pub fn emit(&self) -> [u8; HEADER_LEN] {
        transmute!(SockMsg {
            kind: self.kind.into(),
            req_id: self.req_id.into(),
            tx_id: self.tx_id.into(),
            len: self.len.into(),
        })
    }
}

/// `struct xsd_sockmsg` in `xs_wire.h`.
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct SockMsg {
    kind: U32,
    req_id: U32,
    tx_id: U32,
    len: U32,
}

/// One whole message at the start of a buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frame<'a> {
    /// The message's header.
    pub header: Header,
    /// Exactly `header.len` bytes.
    pub payload: &'a [u8],
}

impl Frame<'_> {
    /// Returns the number of bytes of the buffer that the message uses.
    #[must_use]
    pub const fn wire_len(&self) -> usize {
        HEADER_LEN.saturating_add(self.payload.len())
    }
}

/// Why a stream of bytes is not a sequence of messages; the connection is unusable.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FrameError {
    /// The length of the payload is greater than [`PAYLOAD_MAX`].
    #[error("a payload of {0} bytes exceeds the limit of 4096")]
    Oversize(u64),
}

/// Decodes the message at the start of `buf`.
///
/// `Ok(None)` means that more bytes are needed: never more than [`HEADER_LEN`] + [`PAYLOAD_MAX`] in
/// all, so a buffer of that size is always sufficient.
///
/// # Errors
/// [`FrameError::Oversize`] as soon as the header is complete and its length is too large.
pub fn decode(buf: &[u8]) -> Result<Option<Frame<'_>>, FrameError> {
    let Some((head, rest)) = buf.split_first_chunk::<HEADER_LEN>() else {
        return Ok(None);
    };
    let header = Header::parse(*head);
    let len = usize::try_from(header.len).unwrap_or(usize::MAX);
    checked_len(len)?;
    Ok(rest.get(..len).map(|payload| Frame { header, payload }))
}

fn checked_len(len: usize) -> Result<u32, FrameError> {
    match u32::try_from(len) {
        Ok(n) if len <= PAYLOAD_MAX => Ok(n),
        _ => Err(FrameError::Oversize(len as u64)),
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    #[test]
    fn header_emits_c_layout() {
        let h = Header::new(Op::Write, 0x0403_0201, 7, 4096).unwrap();
        assert_eq!(h.emit(), [11, 0, 0, 0, 1, 2, 3, 4, 7, 0, 0, 0, 0, 16, 0, 0]);
        assert_eq!(Header::new(Op::Write, 0, 0, 4097), Err(FrameError::Oversize(4097)));
    }

    #[test]
    fn oversize_length_is_rejected_from_header_alone() {
        let mut bytes = Header::new(Op::Read, 0, 0, 0).unwrap().emit();
        bytes[12..].copy_from_slice(&4097_u32.to_le_bytes());
        assert_eq!(decode(&bytes), Err(FrameError::Oversize(4097)));
        bytes[12..].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(decode(&bytes), Err(FrameError::Oversize(u64::from(u32::MAX))));
        assert_eq!(decode(&bytes[..15]), Ok(None));
    }

    proptest! {
        #[test]
        fn frame_bytes_round_trip(kind: u32, req_id: u32, tx_id: u32,
                             payload in proptest::collection::vec(any::<u8>(), 0..=PAYLOAD_MAX),
                             tail in proptest::collection::vec(any::<u8>(), 0..40)) {
            let header = Header { kind, req_id, tx_id, len: payload.len() as u32 };
            let mut bytes: Vec<u8> = header.emit().to_vec();
            bytes.extend_from_slice(&payload);
            let whole = bytes.len();
            for cut in [0, 1, 15, whole.saturating_sub(1)] {
                if cut < whole {
                    prop_assert_eq!(decode(&bytes[..cut]), Ok(None));
                }
            }
            bytes.extend_from_slice(&tail);
            let frame = decode(&bytes).unwrap().unwrap();
            prop_assert_eq!(frame.header, header);
            prop_assert_eq!(frame.payload, &payload[..]);
            prop_assert_eq!(frame.wire_len(), whole);
        }

        #[test]
        fn decode_of_random_bytes_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..5000)) {
            if let Ok(Some(frame)) = decode(&bytes) {
                prop_assert!(frame.payload.len() <= PAYLOAD_MAX);
                prop_assert!(frame.wire_len() <= bytes.len());
            }
        }
    }
}
