//! The xenstore wire format: headers, operations, error names, paths and permissions.
//!
//! Every message, in either direction, is a 16-byte [`Header`] followed by at most [`PAYLOAD_MAX`]
//! bytes. Sources: `xen/include/public/io/xs_wire.h` and `docs/misc/xenstore.txt`. Nothing here
//! allocates.

mod errno;
mod frame;
mod op;
pub mod page;
mod path;
mod perm;
mod text;

pub use errno::XsErrno;
pub use frame::{Frame, FrameError, HEADER_LEN, Header, decode};
pub use op::Op;
pub use path::{ABS_PATH_MAX, PathError, REL_PATH_MAX, WirePath, parent};
pub use perm::{Access, PERM_TEXT_MAX, Perm, PermError};
pub use text::{parse_u16, parse_u32, parse_u64, split_string, strings};

/// Maximum size of a message's payload, in bytes (`XENSTORE_PAYLOAD_MAX`).
pub const PAYLOAD_MAX: usize = 4096;
