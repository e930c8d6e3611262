//! Checks on real Xen, each with a name. `examples/selftest.rs` runs them one by one, in one domain
//! for both ends or against a peer in another domain, and `tests/xen.rs` runs them on machines with
//! Xen.

mod copies;
mod device;
mod events;
mod grants;
mod notify;
mod pages;
mod peer;
mod store;

pub use peer::{LocalPeer, Peer};

use pvio_xen_linux::XenDomain;
use std::fmt::Display;
use std::path::PathBuf;
use std::time::Duration;

/// Timeout for any operation, long enough under emulation.
pub const LOST: Duration = Duration::from_secs(20);

/// Outcome of a check, with the reason of a failure.
pub type Outcome = Result<(), String>;

/// Ends a check unless the condition is true.
macro_rules! ensure {
    ($condition:expr, $($why:tt)+) => {
        if !$condition {
            return Err(format!($($why)+));
        }
    };
}
pub(crate) use ensure;

/// Converts an error to text, for `?`.
pub fn say(error: impl Display) -> String {
    error.to_string()
}

/// Ends a check unless two values are equal.
pub fn same<T: PartialEq + std::fmt::Debug>(what: &str, is: T, wanted: T) -> Outcome {
    if is == wanted { Ok(()) } else { Err(format!("{what}: {is:?}, not {wanted:?}")) }
}

/// Domain under test, its peer, and other resources of a check.
pub struct World<'a> {
    pub me: XenDomain,
    /// Whether `me` is made from descriptors for devices of the peer.
    pub is_device: bool,
    pub peer: &'a mut dyn Peer,
    /// Program that maps a page and waits to be killed, if there is one: `PROGRAM hold <domain>
    /// <gref> <port>`.
    pub holder: Option<PathBuf>,
}

/// Names and functions of checks.
pub type Checks<'a> = Vec<(&'static str, Box<dyn Fn(&mut World<'_>) -> Outcome + 'a>)>;

/// Returns the checks in which pages of the peer are mapped.
pub fn mapping() -> Checks<'static> {
    [grants::checks(), notify::checks()].into_iter().flatten().collect()
}

/// Returns the checks that need a peer, and in which no page is mapped.
pub fn copying() -> Checks<'static> {
    [copies::checks(), events::checks()].into_iter().flatten().collect()
}

/// Returns the checks of descriptors that this domain opens for a device of the peer.
pub fn descriptors() -> Checks<'static> {
    device::checks()
}

/// Replaces the domain under test by one made from descriptors, as in a device process.
pub fn as_device(world: &mut World<'_>) -> Outcome {
    world.me = device::of(&world.me, world.peer.id())?;
    world.is_device = true;
    Ok(())
}

/// Returns the checks of this domain alone.
pub fn own() -> Checks<'static> {
    [pages::checks(), store::checks()].into_iter().flatten().collect()
}

/// Runs every check, with both ends in this domain. Returns the counts.
pub fn run_alone(me: XenDomain, holder: Option<PathBuf>) -> (usize, usize) {
    let mut peer = LocalPeer::new(me.clone());
    let mut world = World { me, is_device: false, peer: &mut peer, holder };
    let mut parts = vec![("own, ", own()), ("self, ", copying())];
    if is_pv() {
        parts.push(("self, ", mapping()));
    } else {
        println!("SKIPPED: only a PV domain maps its own grants; run `use` against a `peer`");
        parts.push(("self, ", grants::refused_here()));
    }
    parts.push(("self, ", descriptors()));
    let counts = parts.into_iter().map(|(prefix, checks)| run(prefix, &checks, &mut world));
    let counts = counts.fold((0, 0), |sum, (passed, failed)| (sum.0 + passed, sum.1 + failed));
    let device = run_as_device("self, device, ", &[copying()], &mut world);
    (counts.0 + device.0, counts.1 + device.1)
}

/// Runs checks with a platform that was made from descriptors. Returns the counts.
pub fn run_as_device(prefix: &str, all: &[Checks<'_>], world: &mut World<'_>) -> (usize, usize) {
    if let Err(why) = as_device(world) {
        println!("FAIL {prefix}descriptors: {why}");
        return (0, 1);
    }
    let counts = all.iter().map(|checks| run(prefix, checks, world));
    counts.fold((0, 0), |sum, (passed, failed)| (sum.0 + passed, sum.1 + failed))
}

/// Whether this is a PV domain, which can map its own grants.
pub fn is_pv() -> bool {
    std::fs::read_to_string("/sys/hypervisor/guest_type").is_ok_and(|kind| kind == "PV\n")
}

/// Runs checks, prints a line for each, and returns the counts.
pub fn run(prefix: &str, checks: &Checks<'_>, world: &mut World<'_>) -> (usize, usize) {
    let (mut passed, mut failed) = (0, 0);
    for (name, check) in checks {
        match check(world) {
            Ok(()) => {
                passed += 1;
                println!("PASS {prefix}{name}");
            }
            Err(why) => {
                failed += 1;
                println!("FAIL {prefix}{name}: {why}");
            }
        }
        // Resources that a failed check left at the peer must not affect the next check.
        if let Err(why) = world.peer.forget() {
            println!("FAIL {prefix}{name}: the peer did not clean up: {why}");
            failed += 1;
        }
    }
    (passed, failed)
}

/// Returns the number of this process's address ranges that belong to a device.
pub fn ranges_of(device: &str) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    maps.lines().filter(|line| line.ends_with(device)).count()
}
