//! Constants and messages of the protocol, all big-endian.
//!
//! Source: `doc/proto.md` of NBD (<https://github.com/NetworkBlockDevice/nbd>).

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `NBDMAGIC`.
pub const GREETING: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, of the newstyle handshake.
pub const OPTION: u64 = 0x4948_4156_454f_5054;
pub const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
pub const REQUEST: u32 = 0x2560_9513;
pub const SIMPLE_REPLY: u32 = 0x6744_6698;
pub const STRUCTURED_REPLY: u32 = 0x668e_33ef;

/// `NBD_FLAG_FIXED_NEWSTYLE`, and the client's flag in reply to it.
pub const FIXED_NEWSTYLE: u16 = 1;
/// `NBD_FLAG_C_NO_ZEROES`.
pub const NO_ZEROES: u16 = 2;

pub mod opt {
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
}

pub mod rep {
    pub const ACK: u32 = 1;
    pub const INFO: u32 = 3;
    /// Flag of all error replies.
    pub const ERROR: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERROR + 1;
    pub const ERR_POLICY: u32 = ERROR + 2;
    pub const ERR_TLS_REQD: u32 = ERROR + 5;
    pub const ERR_UNKNOWN: u32 = ERROR + 6;
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR + 8;
}

pub mod info {
    pub const EXPORT: u16 = 0;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags of an export.
pub mod export {
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
}

pub mod cmd {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISCONNECT: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const WRITE_ZEROES: u16 = 6;
}

/// Types of a structured reply's chunk.
pub mod chunk {
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    /// Flag of all error chunk types.
    pub const ERROR: u16 = 1 << 15;
    /// `NBD_REPLY_FLAG_DONE`.
    pub const DONE: u16 = 1;
}

/// `ESHUTDOWN`: the server is about to shut down.
pub const SHUTDOWN: u32 = 108;

/// The server's greeting.
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct Greeting {
    /// [`GREETING`].
    pub magic: U64,
    /// [`OPTION`], for a newstyle server.
    pub style: U64,
    pub flags: U16,
}

/// The header of an option from the client. Its data follow.
#[derive(IntoBytes, Unaligned, Immutable)]
#[repr(C)]
pub struct OptionHeader {
    /// [`OPTION`].
    pub magic: U64,
    /// One of [`opt`].
    pub option: U32,
    /// Bytes of the data.
    pub len: U32,
}

/// The header of a reply to an option. Its data follow.
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct OptionReply {
    /// [`OPTION_REPLY`].
    pub magic: U64,
    pub option: U32,
    /// One of [`rep`].
    pub kind: U32,
    /// Bytes of the data.
    pub len: U32,
}

/// Data of `NBD_INFO_EXPORT`, after its type.
#[derive(FromBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct InfoExport {
    pub size: U64,
    /// Bits of [`export`].
    pub flags: U16,
}

/// Data of `NBD_INFO_BLOCK_SIZE`, after its type.
#[derive(FromBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct InfoBlockSize {
    pub minimum: U32,
    pub preferred: U32,
    pub maximum: U32,
}

/// The header of a request. The data of a write follow.
#[derive(FromBytes, IntoBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct Request {
    /// [`REQUEST`].
    pub magic: U32,
    pub flags: U16,
    /// One of [`cmd`].
    pub command: U16,
    pub cookie: U64,
    pub offset: U64,
    pub len: U32,
}

impl Request {
    /// Creates the header of a request without flags.
    pub fn new(command: u16, cookie: u64, offset: u64, len: u32) -> Self {
        Self {
            magic: REQUEST.into(),
            flags: U16::ZERO,
            command: command.into(),
            cookie: cookie.into(),
            offset: offset.into(),
            len: len.into(),
        }
    }
}

/// A simple reply, after its magic number [`SIMPLE_REPLY`]. The data of a read follow.
#[derive(FromBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct SimpleReply {
    pub error: U32,
    pub cookie: U64,
}

/// The header of a structured reply's chunk, after its magic number [`STRUCTURED_REPLY`].
#[derive(FromBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct Chunk {
    pub flags: U16,
    /// One of [`chunk`].
    pub kind: U16,
    pub cookie: U64,
    /// Bytes of the payload.
    pub len: U32,
}

/// The payload of [`chunk::OFFSET_HOLE`].
#[derive(FromBytes, Unaligned, KnownLayout, Immutable)]
#[repr(C)]
pub struct Hole {
    pub offset: U64,
    pub len: U32,
}
