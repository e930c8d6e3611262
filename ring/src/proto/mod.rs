//! Wire formats, from the public headers (`xen/include/public/io/*.h`). Each is parsed from a
//! private copy into a well-formed value, or rejected with a reason; and encoded from such a value.

pub mod blkif;
pub mod checksum;
pub mod headers;
pub mod netif;
