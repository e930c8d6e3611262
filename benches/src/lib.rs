//! Benchmarks of pvio, each against the raw limit of the machine in the same interleaved run.
//!
//! | module | measures |
//! |---|---|
//! | [`disk`] | a guest's frontend, the backend and an image file, against a bare io_uring |
//! | [`neighbours`] | a guest beside a hostile one, against the same guest beside an honest one |
//! | [`net`] | a guest's frontend, the backend and a tap, against a bare tap |
//! | [`ring`] | both sides of a ring on two cores, against the macros of Xen's `ring.h` in C |
//! | [`row`] | the result of a measurement: a ratio with its spread, processor time |
//!
//! On a shared machine, an absolute figure is not reproducible. Only the ratio to a reference
//! measured immediately before, on the same cores, is meaningful. No test asserts a duration.
#![forbid(unsafe_code)]

pub mod cpu;
pub mod disk;
pub mod neighbours;
pub mod net;
pub mod netns;
pub mod pin;
pub mod ring;
pub mod row;
pub mod until;
