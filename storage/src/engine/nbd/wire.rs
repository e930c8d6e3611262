//! Constants and message layouts of the protocol, all big-endian.

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

/// Returns the header of a request.
pub fn request(command: u16, cookie: u64, offset: u64, len: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    let fields: [(usize, &[u8]); 5] = [
        (0, &REQUEST.to_be_bytes()),
        (6, &command.to_be_bytes()),
        (8, &cookie.to_be_bytes()),
        (16, &offset.to_be_bytes()),
        (24, &len.to_be_bytes()),
    ];
    for (at, field) in fields {
        bytes[at..at + field.len()].copy_from_slice(field);
    }
    bytes
}

/// Reads big-endian numbers from the front of a message.
pub struct Reader<'a>(pub &'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*first)
    }

    pub fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_be_bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_be_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_be_bytes)
    }
}
