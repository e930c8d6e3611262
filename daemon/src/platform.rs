//! Properties of the domain that a driver runs in.

use std::os::fd::AsFd;

/// The requirements on a platform: those of disks and of NICs, and that it can be used from several
/// threads.
pub trait Platform:
    pvio_blkback::vbd::Platform<Channel: AsFd> + pvio_netback::Platform + Send + 'static
{
}
impl<P> Platform for P where
    P: pvio_blkback::vbd::Platform<Channel: AsFd> + pvio_netback::Platform + Send + 'static
{
}
