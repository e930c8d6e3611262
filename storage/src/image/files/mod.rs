//! What is known about the files of a disk besides their contents: plain data that one process
//! passes to another together with the descriptors.

mod device;
#[cfg(feature = "serde")]
pub(super) mod path_text;
mod record;

pub use device::DeviceProperties;
pub use record::FileRecord;
pub(super) use record::{Description, Opened};
