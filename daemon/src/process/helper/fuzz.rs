//! Access of the fuzz targets to what the supervisor does with the messages of an image helper.

use super::{Answer, ChannelError, Files, Message, receive, resolved};
use crate::process::channel::Channel;
use pvio_storage::host::OpenFailure;
use pvio_storage::image::{Disk, Resolved};
use std::os::fd::OwnedFd;

/// Receives the answer from the other end of a channel, whose messages are there already.
///
/// # Errors
/// There is no valid answer.
pub fn answer(
    channel: &Channel,
    disk: &Disk,
) -> Result<Result<Resolved, OpenFailure>, ChannelError> {
    let next = || -> Result<(Message<Answer>, Vec<OwnedFd>), ChannelError> {
        channel.receive()?.ok_or(ChannelError::Closed)
    };
    let (answer, files): (Answer, Files) = receive(Resolved::MAX_FILES, next)?;
    Ok(resolved(disk, answer, files))
}
