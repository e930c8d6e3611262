//! Benchmarks of pvio, each against the raw limit of the machine in the same interleaved run.
//!
//! | module | measures |
//! |---|---|
//! | [`disk`] | a guest's frontend, the backend and an image file, against a bare io_uring |
//! | [`net`] | a guest's frontend, the backend and a tap, against a bare tap |
//! | [`ring`] | both ends of a ring on two cores, against the macros of Xen's `ring.h` in C |
//! | [`row`] | what a measurement says: a ratio with its spread, processor time |
//!
//! A figure by itself says little on a shared machine; only the ratio to a reference measured a
//! moment before, on the same cores, does. Nothing here asserts anything about time.
#![forbid(unsafe_code)]

pub mod cpu;
pub mod disk;
pub mod net;
pub mod netns;
pub mod pin;
pub mod ring;
pub mod row;
pub mod until;
