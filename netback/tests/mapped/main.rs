//! Every test of a queue once more, with the guest's pages mapped for each batch instead of copied
//! by the hypervisor. The results must be the same.
#![expect(clippy::duplicate_mod, reason = "each test file has its own parts of what is common")]

#[path = "../hostile.rs"]
mod hostile;
#[path = "../receive.rs"]
mod receive;
#[path = "../refusals.rs"]
mod refusals;
#[path = "../transmit.rs"]
mod transmit;
#[path = "../waiting.rs"]
mod waiting;
