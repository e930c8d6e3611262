//! The guest's software: serves the files of its disk over its NIC.
//!
//! | module | contents |
//! |---|---|
//! | [`fs`] | the image's file system, read on its own thread |
//! | [`http`] | the server, on smoltcp's TCP sockets |
//! | [`meter`] | rates and latencies of the last minute |
//! | [`status`] | states of the devices for the live page |

pub mod fs;
pub mod http;
pub mod meter;
pub mod status;
