//! `pvio revive`: after a driver domain came back under its old number, its backends too.
//!
//! A driver domain that is destroyed takes its backends' directories along. Its guests' frontends
//! stay as they are: they hold their rings, their grants are given to a domain of that number, and
//! wait for answers. A domain that comes back under the same number (`xl restore` of a state saved
//! with `xl save -D`) may use all of it again; what it lacks are those directories.

use crate::failure::{Failure, say};
use clap::Args;
use pvio_grant_table::DomId;
use pvio_xenbus::client::{Client, default_path};
use pvio_xenbus::handshake::common::{find_domain, revive_backends};

/// `pvio revive`.
#[derive(Debug, Clone, Args)]
pub struct ReviveArgs {
    /// The driver domain's name or number
    pub domain: String,
}

/// Makes the directories again.
///
/// # Errors
/// When there is no such domain, or this is not dom0.
pub fn run(args: &ReviveArgs) -> Result<(), Failure> {
    let path = default_path();
    let mut xs = Client::connect(&path).map_err(|e| {
        Failure::input(format!("no xenstore at {}: {e}", path.display()), "run it in dom0")
    })?;
    let domain = match args.domain.parse() {
        Ok(number) => Some(DomId(number)),
        Err(_) => find_domain(&mut xs, &args.domain).map_err(Failure::of)?,
    };
    let Some(domain) = domain else {
        let what = format!("there is no domain {}", args.domain);
        return Err(Failure::input(what, "start it first; xl list shows all"));
    };
    let made = revive_backends(&mut xs, domain).map_err(Failure::of)?;
    for addr in &made {
        say!("{}", addr.backend_path());
    }
    say!("{} backends of domain {domain} made again", made.len());
    Ok(())
}
