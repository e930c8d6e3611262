//! The tests with the real backend again, with a backend that maps the guest's pages for each batch
//! instead of grant copies: the results must be the same.
#![expect(clippy::duplicate_mod, reason = "each test file has its own parts of what is common")]

#[path = "../gso.rs"]
mod gso;
#[path = "../loopback.rs"]
mod loopback;
#[cfg(feature = "smoltcp")]
#[path = "../smoltcp.rs"]
mod smoltcp;
