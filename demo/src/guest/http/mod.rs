//! An HTTP/1.1 server on smoltcp's TCP sockets: the files of the disk, a live page, metrics.
//!
//! One thread, which never waits for the disk: requests go to the disk thread and the connection
//! that asked goes on when its answer is there. Everything is bounded: [`SOCKETS`] sockets,
//! [`MAX_HEAD`] bytes of a request, two reads in flight for a response, a time for each step.
//!
//! | module | holds |
//! |---|---|
//! | [`request`] | bytes to a request, or a refusal with its status |
//! | [`range`] | which bytes of a file are wanted, and whether it is wanted at all |
//! | [`response`] | heads, error bodies |
//! | [`listing`] | a directory as a page |
//! | [`live`] | the live page, `/.pvio/status.json`, `/.pvio/metrics` |
//! | `answer` | one answer: what it is made of, how it is sent |
//! | [`connection`] | one connection, from listening to closed |
//! | `gate` | clients wait while every socket is taken |
//! | `state` | what all connections share |
//! | [`server`] | all of them, the interface, and when to sleep |

mod answer;
pub mod connection;
mod gate;
pub mod listing;
pub mod live;
pub mod range;
pub mod request;
pub mod response;
pub mod server;
mod state;

pub use server::{Config, Server};
pub use state::Shown;

use std::time::Duration;

/// Connections that are given all the time they may take. While there are more, one that does not get on
/// is closed for the next client.
pub const CONNECTIONS: usize = 32;
/// TCP sockets. A client more waits until one is free.
pub const SOCKETS: usize = CONNECTIONS + 8;
/// Bytes of a request's head.
pub const MAX_HEAD: usize = 16 << 10;
/// Headers of a request.
pub const MAX_HEADERS: usize = 64;
/// Bytes of one read from the disk thread; two are in flight for each response.
pub const PART: usize = 128 << 10;
/// A kept connection with no request closes after this.
pub const IDLE: Duration = Duration::from_secs(15);
/// A head must be complete after this.
pub const HEAD_TIME: Duration = Duration::from_secs(10);
/// The same while there are more than [`CONNECTIONS`].
pub const CROWDED_HEAD_TIME: Duration = Duration::from_millis(500);
/// The disk must have answered after this.
pub const DISK_TIME: Duration = Duration::from_secs(30);
/// A client must have taken something after this.
pub const STALL: Duration = Duration::from_secs(30);
/// A closed connection must be gone after this.
pub const LINGER: Duration = Duration::from_secs(5);
/// The same while there are more than [`CONNECTIONS`].
pub const CROWDED_LINGER: Duration = Duration::from_millis(300);
