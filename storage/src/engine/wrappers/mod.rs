//! Engines around another engine, which change or record its operations.

pub mod faults;
pub mod pause;
pub mod record;
pub mod throttle;
pub mod trace;
pub mod unflushed;
