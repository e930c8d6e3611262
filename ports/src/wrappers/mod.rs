//! Wrappers (decorators) of a port, in this order from the guest on:
//!
//! | wrapper | effect |
//! |---|---|
//! | [`capture`] | copies packets for an observer |
//! | [`guard`] | drops packets that a guest sends under addresses that are not its own |
//! | [`shape`] | limits the packet and byte rate, and shares a rate between vifs |
//! | [`faults`] | loses, repeats, reorders, corrupts and delays packets |
//!
//! The first two [inspect] packets.
//! [`RuntimeSettings`](crate::settings::RuntimeSettings) wraps a port in all of them. Their settings can
//! be changed while packets pass.
#![forbid(unsafe_code)]

pub mod capture;
pub mod faults;
pub mod guard;
pub mod inspect;
pub mod shape;
mod shared_rate;
