//! The processes of a driver domain: the supervisor's side and the devices' side.

pub mod channel;
pub mod child;
pub mod hub;
pub mod messages;
pub mod registry;
pub mod supervised;
