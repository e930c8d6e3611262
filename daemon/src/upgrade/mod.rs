//! `pvio upgrade`: another binary takes the place of a running supervisor, then of each device
//! process.
//!
//! | module | contents |
//! |---|---|
//! | [`stage`] | the stage at which a process of an upgrade begins |
//! | [`versions`] | the versions that two binaries must have in common |
//! | [`progress`] | the request, and the outcome for each device |
//! | [`handover`] | the trial of the new binary, and its start in place of the old one |
//! | [`command`] | the client |

pub mod command;
pub mod handover;
pub mod progress;
pub mod stage;
pub mod versions;
