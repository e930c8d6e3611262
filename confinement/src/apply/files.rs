//! Landlock.

use crate::applied::{Missing, Outcome, Reason};
use crate::layers::FileAccess;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

/// A ruleset with the roots that cannot be opened, or why there is none.
pub type Prepared = Result<(RulesetCreated, Vec<String>), Outcome>;

/// Newest version that the library knows. On an older kernel, what that lacks is left out.
const NEWEST: ABI = ABI::V10;

/// Opens the permitted directories and creates the ruleset. Without a directory that cannot be
/// opened, the others are enforced nevertheless.
pub fn prepare(files: &FileAccess) -> Prepared {
    let FileAccess::Below(roots) = files else { return Err(Outcome::NotConfigured) };
    let failed = |step: &str, error: &dyn std::fmt::Display| {
        let detail = format!("{step}: {error}");
        Outcome::Missing(Missing { reason: Reason::Failed, detail })
    };
    let created = || -> Result<RulesetCreated, RulesetError> {
        Ruleset::default()
            .handle_access(AccessFs::from_all(NEWEST))?
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(Scope::from_all(NEWEST))?
            .create()
    };
    let mut ruleset = created().map_err(|error| failed("landlock_create_ruleset", &error))?;
    let mut absent = Vec::new();
    for root in roots {
        let path = root.path.display();
        let Ok(opened) = PathFd::new(&root.path) else {
            absent.push(path.to_string());
            continue;
        };
        // The library leaves rights out that a file, which is no directory, cannot have.
        let rule = PathBeneath::new(opened, access(root.write));
        ruleset = ruleset.add_rule(rule).map_err(|e| failed(&path.to_string(), &e))?;
    }
    Ok((ruleset, absent))
}

/// Block devices need `ioctl`, for their size.
fn access(write: bool) -> BitFlags<AccessFs> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::IoctlDev;
    if write { read | AccessFs::WriteFile | AccessFs::Truncate } else { read }
}

/// Enforces the ruleset.
pub fn restrict(prepared: Prepared) -> Outcome {
    let (ruleset, absent) = match prepared {
        Ok(prepared) => prepared,
        Err(outcome) => return outcome,
    };
    let missing = |reason, detail: String| Outcome::Missing(Missing { reason, detail });
    let status = match ruleset.restrict_self() {
        Ok(status) => status,
        Err(error) => {
            return missing(Reason::Failed, format!("landlock_restrict_self: {error}"));
        }
    };
    let abi = match status.landlock {
        LandlockStatus::NotImplemented => {
            let detail = "build it with CONFIG_SECURITY_LANDLOCK, Linux 5.13 or later";
            return missing(Reason::NotBuilt, detail.to_owned());
        }
        LandlockStatus::NotEnabled => {
            let detail = "add landlock to the kernel's parameter lsm=";
            return missing(Reason::NotEnabled, detail.to_owned());
        }
        LandlockStatus::Available { effective_abi, .. } => effective_abi,
    };
    if status.ruleset == RulesetStatus::NotEnforced {
        return missing(Reason::Failed, "the kernel enforces nothing".to_owned());
    }
    let holds = [
        (ABI::V1, "files"),
        (ABI::V4, "TCP"),
        (ABI::V5, "device ioctl"),
        (ABI::V6, "abstract sockets and signals"),
    ];
    let holds = holds.iter().filter(|(since, _)| *since <= abi).map(|(_, what)| *what);
    let holds: Vec<_> = holds.collect();
    let mut detail = format!("ABI {}: {}", abi as i32, holds.join(", "));
    for path in absent {
        detail += &format!("; {path} cannot be opened");
    }
    Outcome::Applied(detail)
}
