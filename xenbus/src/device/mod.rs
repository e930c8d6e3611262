//! What each end of a device should do about the other's state: decisions, and nothing else.
//!
//! Both machines work alike. On every event, read the other end's state and ask the machine what
//! to do; do it, tell the machine that it is done, and ask again until there is nothing to do:
//!
//! ```
//! # use pvio_xenbus::{XenbusState, device::{BackAction, BackendMachine}};
//! # fn perform(_: BackAction) -> bool { true }
//! # let (front, online) = (XenbusState::Initialising, true);
//! let mut machine = BackendMachine::new();
//! loop {
//!     match machine.decide(front, online) {
//!         BackAction::None => break,
//!         action if perform(action) => machine.done(action),
//!         _ => machine.failed(),
//!     }
//! }
//! assert_eq!(machine.state(), XenbusState::InitWait);
//! ```
//!
//! This ends after a few steps whatever the other end writes, in whatever order, and however many
//! events were merged or came without cause. The rules follow what Linux's drivers do
//! (`drivers/xen/xenbus`, `xen-blkback`, `xen-blkfront`), widened where a frontend restarts
//! without saying so.

mod back;
mod front;

pub use back::{BackAction, BackendMachine};
pub use front::{FrontAction, FrontendMachine};
