//! The processes of a driver domain: the supervisor's side and the devices' side.
//!
//! | module | contents |
//! |---|---|
//! | [`channel`], [`messages`], [`faults`] | what processes tell each other |
//! | [`child`], [`hub`] | starting a process, and waiting for the events of all of them |
//! | [`registry`], [`found`] | how a supervisor finds the processes of its predecessor |
//! | [`supervised`], [`deaths`] | a session in a process, which is replaced when it dies |
//! | [`disk`], [`nic`] | a disk, a NIC in a process of its own |
//! | [`resources`] | what the supervisor opens for a session of any class |
//! | [`device`] | the connection of a device process to its supervisor |
//! | [`helper`] | the process that opens images |
//! | [`confine`] | the rights that processes keep |
//! | [`status`] | what is reported of a device's process |
//! | [`run`] | the commands |

pub mod channel;
pub mod child;
pub mod confine;
pub mod deaths;
pub mod device;
pub mod disk;
pub mod faults;
pub mod found;
pub mod helper;
pub mod hub;
pub mod messages;
pub mod nic;
pub mod registry;
pub mod resources;
pub mod run;
pub mod status;
pub mod supervised;
