//! The tests with the real backend once more, which maps the guest's pages for each batch instead of
//! having them copied by the hypervisor: nobody may be able to tell.
#![expect(clippy::duplicate_mod, reason = "each test file has its own parts of what is common")]

#[path = "../gso.rs"]
mod gso;
#[path = "../loopback.rs"]
mod loopback;
#[cfg(feature = "smoltcp")]
#[path = "../smoltcp.rs"]
mod smoltcp;
