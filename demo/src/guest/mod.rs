//! The guest: what is on its disk, served over its NIC.
//!
//! | module | holds |
//! |---|---|
//! | [`fs`] | the image's file system, read on a thread of its own |
//! | [`http`] | the server, on smoltcp's TCP sockets |
//! | [`meter`] | rates and latencies of the last minute |
//! | [`status`] | what the live page shows |

pub mod fs;
pub mod http;
pub mod meter;
pub mod status;
