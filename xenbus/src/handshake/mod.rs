//! Typed handshakes: the keys that both sides of a device write to xenstore, one struct per group
//! of keys. No other module contains the name of a key.
//!
//! | writer | when | disk | network |
//! |---|---|---|---|
//! | toolstack, to the backend | at creation | [`vbd::ToolstackBack`] | [`vif::ToolstackBack`] |
//! | toolstack, to the frontend | at creation | [`vbd::ToolstackFront`] | [`vif::ToolstackFront`] |
//! | backend | before `InitWait` (2) | [`vbd::BackOffer`] | [`vif::BackOffer`] |
//! | frontend | before `Initialised` (3) or `Connected` (4) | [`vbd::FrontRequest`] | [`vif::FrontRequest`] |
//! | backend | with `Connected` (4) | [`vbd::BackDisk`] | nothing |
//! | both, internally | at the end | [`vbd::Negotiated`] | [`vif::Negotiated`] |
//!
//! Each struct has `read`, which rejects missing, malformed or out-of-bounds values with a
//! [`HandshakeError`] that names the key and the value, and `write`. Both use one transaction, so
//! that no partial handshake is visible. To add a state change to the same transaction, call them
//! inside [`crate::transaction`], which they then join:
//!
//! ```
//! # use std::{cell::RefCell, rc::Rc};
//! # use pvio_ring::DomId;
//! # use pvio_xenbus::{XenbusState, transaction};
//! # use pvio_xenbus::handshake::{HandshakeError, common, vbd};
//! # use pvio_xenstored::{LocalClient, Store};
//! # let store = Rc::new(RefCell::new(Store::default()));
//! # let mut xs = LocalClient::connect(&store, DomId::DOM0);
//! # let addr = common::DeviceAddr::new(common::BackendKind::Vbd, DomId::DOM0, DomId(5), 51712);
//! # vbd::create_device(&mut xs, addr, &vbd::ToolstackBack::new(addr, "/dev/null"))?;
//! let base = addr.backend_path();
//! let offer = vbd::BackOffer { flush: true, max_queues: Some(4), ..vbd::BackOffer::default() };
//! transaction(&mut xs, |tx| {
//!     offer.write(tx, &base)?;
//!     common::write_state(tx, &base, XenbusState::InitWait)
//! })?;
//! assert_eq!(vbd::BackOffer::read(&mut xs, &base)?, offer);
//! # Ok::<(), HandshakeError>(())
//! ```

pub mod common;
mod encoding;
mod error;
mod fields;
mod record;
pub mod vbd;
pub mod vif;

pub use error::{EscapedValue, HandshakeError};
