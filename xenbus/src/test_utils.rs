//! Parts that tests and examples share (feature `test-utils`). No part of the product uses them.

use crate::driver::{BackendClass, BackendDriver, Life};
use crate::{Xenstore, XsError};
use core::time::Duration;

/// Carries out the steps of one device until the toolstack has removed it. A daemon steps many devices
/// and wakes up for their deadlines; this wakes up every 20 ms.
///
/// # Errors
/// The connection to xenstore is lost.
pub fn serve<C: BackendClass>(
    mut device: BackendDriver<C>,
    mut xenstore: impl Xenstore,
) -> Result<(), XsError> {
    while device.step(&mut xenstore)? == Life::Alive {
        xenstore.wait_event(Some(Duration::from_millis(20)))?;
    }
    Ok(())
}
