//! Properties of the domain that a driver runs in.

use std::os::fd::AsFd;

/// What a platform must do for both kinds of device, and for threads.
pub trait Platform:
    pvio_blkback::vbd::Platform<Channel: AsFd> + pvio_netback::Platform + Send + 'static
{
}
impl<P> Platform for P where
    P: pvio_blkback::vbd::Platform<Channel: AsFd> + pvio_netback::Platform + Send + 'static
{
}
