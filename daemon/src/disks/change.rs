//! Changing the settings of a disk that is being served.

use super::args::SetArgs;
use super::{connect, domain, find_disk};
use crate::failure::{Failure, say};
use pvio_storage::image::DiskOptions;
use pvio_xenbus::handshake::vbd::ToolstackBack;

/// Changes a disk's limits, latency and injected failures.
///
/// # Errors
/// There is no such disk, or an option can only be set when a disk is attached.
pub fn set(args: &SetArgs) -> Result<(), Failure> {
    let fixed = args.options.fixed();
    if fixed != DiskOptions::default() {
        return Err(Failure::input(
            format!("{fixed} cannot be changed while a disk is served"),
            "detach it (pvio detach-disk) and attach it again with the new options",
        ));
    }
    let mut xs = connect(&args.store)?;
    let guest = domain(&mut xs, &args.guest)?;
    let addr = find_disk(&mut xs, guest, args.vdev)?;
    let config = ToolstackBack::read(&mut xs, &addr.backend_path()).map_err(Failure::of)?;
    let before = config.options.as_deref().unwrap_or_default();
    let before = DiskOptions::from_bytes(before).map_err(Failure::of)?;
    let now = args.options.clone().or(before).to_string();
    ToolstackBack::write_options(&mut xs, addr, &now).map_err(Failure::of)?;
    say!("{}  {now}", args.vdev);
    Ok(())
}
