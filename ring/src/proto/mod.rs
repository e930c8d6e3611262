//! Wire formats, from the public headers (`xen/include/public/io/*.h`). Each is parsed from a
//! private copy into a value that cannot be wrong in form, or refused with the reason; and
//! emitted from such a value.

pub mod blkif;
pub mod checksum;
pub mod netif;
