//! State machines of both sides of a device: they decide the reaction to the peer's state, without
//! I/O.
//!
//! Both machines are used in the same way. On every event, read the peer's state and get the next
//! action from the machine; carry it out, report it to the machine as done, and repeat until there
//! is no action:
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
//! The loop ends after a few steps, whatever the peer writes, in whatever order, and however many
//! events were merged or spurious. The rules follow Linux's drivers (`drivers/xen/xenbus`,
//! `xen-blkback`, `xen-blkfront`), extended for frontends that restart without closing.

mod back;
mod front;

pub use back::{BackAction, BackendMachine};
pub use front::{FrontAction, FrontendMachine};
