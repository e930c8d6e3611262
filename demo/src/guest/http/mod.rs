//! An HTTP/1.1 server on smoltcp's TCP sockets: the files of the disk, a live page, metrics.
//!
//! It runs on one thread, which never blocks on the disk: requests are sent to the disk thread, and
//! a connection continues when its reply arrives. All resources are bounded: [`SOCKETS`] sockets,
//! [`MAX_HEAD`] bytes of a request, two reads in flight for a response, a timeout for each state.
//!
//! | module | contents |
//! |---|---|
//! | [`request`] | parser of requests; a rejection has a status |
//! | [`range`] | conditional and range requests |
//! | [`response`] | heads, error bodies |
//! | [`listing`] | a directory as a page |
//! | [`live`] | the live page, `/.pvio/status.json`, `/.pvio/metrics` |
//! | `sending` | one response, and how it is sent |
//! | [`connection`] | one connection, from listening to closed |
//! | `gate` | drops connection requests while no socket is listening |
//! | `state` | state that all connections share |
//! | [`server`] | event loop: all connections, the interface, deadlines |

pub mod connection;
mod gate;
pub mod listing;
pub mod live;
pub mod range;
pub mod request;
pub mod response;
mod sending;
pub mod server;
mod state;

pub use server::{Config, Server};
pub use state::ServerStatus;

use std::time::Duration;

/// Number of connections up to which the normal timeouts apply. With more, connections without
/// progress are closed early.
pub const CONNECTIONS: usize = 32;
/// Number of TCP sockets. Further clients wait until one is free.
pub const SOCKETS: usize = CONNECTIONS + 8;
/// Maximum size of a request's head in bytes.
pub const MAX_HEAD: usize = 16 << 10;
/// Maximum number of headers of a request.
pub const MAX_HEADERS: usize = 64;
/// Size of one read from the disk thread in bytes; two are in flight for each response.
pub const PART: usize = 128 << 10;
/// Timeout of an idle connection.
pub const IDLE: Duration = Duration::from_secs(15);
/// Timeout of receiving a head.
pub const HEAD_TIME: Duration = Duration::from_secs(10);
/// The same with more than [`CONNECTIONS`] connections.
pub const CROWDED_HEAD_TIME: Duration = Duration::from_millis(500);
/// Timeout of the disk thread's reply to a path.
pub const DISK_TIME: Duration = Duration::from_secs(30);
/// Timeout of a client that does not receive.
pub const STALL: Duration = Duration::from_secs(30);
/// Timeout of closing a connection.
pub const LINGER: Duration = Duration::from_secs(5);
/// The same with more than [`CONNECTIONS`] connections.
pub const CROWDED_LINGER: Duration = Duration::from_millis(300);
