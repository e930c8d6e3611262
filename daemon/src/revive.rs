//! `pvio revive`: re-creates the backend directories of a driver domain that was restored under its
//! old number.
//!
//! When a driver domain is destroyed, its backend directories are removed. The frontends of its
//! guests keep their state: their rings, the grants to a domain of that number, and their
//! outstanding requests. A domain that is restored under the same number (`xl restore` of a state
//! saved with `xl save -D`) can use all of that; only the directories are missing.

use crate::failure::{Failure, say};
use clap::Args;
use pvio_grant_table::DomId;
use pvio_ring::error::Report;
use pvio_xenbus::client::{Client, default_path};
use pvio_xenbus::handshake::common::{find_domain, revive_backends};

/// Arguments of `pvio revive`.
#[derive(Debug, Clone, Args)]
pub struct ReviveArgs {
    /// The driver domain's name or number
    pub domain: String,
}

/// Creates the directories.
///
/// # Errors
/// There is no such domain, or this is not dom0.
pub fn run(args: &ReviveArgs) -> Result<(), Failure> {
    let path = default_path();
    let mut xs = Client::connect(&path).map_err(|e| {
        let what = format!("xenstore cannot be reached at {}: {}", path.display(), Report(&e));
        Failure::input(what, "run it in dom0")
    })?;
    let domain = match args.domain.parse() {
        Ok(number) => Some(DomId(number)),
        Err(_) => find_domain(&mut xs, &args.domain).map_err(Failure::of)?,
    };
    let Some(domain) = domain else {
        let what = format!("there is no domain {}", args.domain);
        return Err(Failure::input(what, "start it first (xl list shows all domains)"));
    };
    let created = revive_backends(&mut xs, domain).map_err(Failure::of)?;
    for addr in &created {
        say!("{}", addr.backend_path());
    }
    say!("{} backends of domain {domain} re-created", created.len());
    Ok(())
}
