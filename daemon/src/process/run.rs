//! The commands of the processes.

use super::channel::Channel;
use super::{disk, helper, nic};
use crate::failure::Failure;
use crate::serve::log_to;
use clap::{Args, ValueEnum};
use pvio_event_channel::DevicePlatform;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::os::fd::AsFd;

/// Arguments of a process that the supervisor starts.
#[derive(Debug, Clone, Args)]
pub struct ProcessArgs {
    /// Kind of process, or platform
    pub first: String,
    /// Kind of the device's process
    pub second: Option<DeviceKind>,
}

/// The kind of a device process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceKind {
    /// A disk
    Disk,
    /// A NIC
    Nic,
}

/// Returns the connection to the supervisor, which is standard input.
///
/// # Errors
/// The process was not started by a supervisor.
pub fn connection() -> Result<Channel, Failure> {
    let misused = |e: io::Error| {
        Failure::input(
            format!("standard input is not the connection to a supervisor: {e}"),
            "pvio serve starts this command",
        )
    };
    let socket = io::stdin().as_fd().try_clone_to_owned().map_err(misused)?;
    rustix::net::sockopt::socket_type(&socket).map_err(|e| misused(e.into()))?;
    let flags = fcntl_getfl(&socket).map_err(|e| misused(e.into()))?;
    fcntl_setfl(&socket, flags | OFlags::NONBLOCK).map_err(|e| misused(e.into()))?;
    Ok(Channel::new(socket))
}

/// Runs an image helper.
///
/// # Errors
/// As [`helper::run`].
pub fn image_helper() -> Result<(), Failure> {
    log_to(None)?;
    helper::run(&connection()?)
}

/// Runs the process of a device.
///
/// # Errors
/// There is no supervisor, or a system call failed.
pub fn device<P>(kind: DeviceKind) -> Result<(), Failure>
where
    P: DevicePlatform<Channel: AsFd> + Send + 'static,
    P::Description: Serialize + DeserializeOwned,
{
    log_to(None)?;
    match kind {
        DeviceKind::Disk => disk::serve::<P>(connection()?),
        DeviceKind::Nic => nic::serve::<P>(connection()?),
    }
}
