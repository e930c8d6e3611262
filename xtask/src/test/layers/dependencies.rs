//! The packages, and the dependencies allowed between them.

use super::Package;

/// Each package of layers 1 to 4 and the packages of the workspace it may depend on. A dependency
/// is on a lower layer, or on the same layer if one package of it is an extension of the other.
const MAY_NEED: &[(&str, &[&str])] = &[
    // 1: shared memory, index arithmetic, wire formats
    ("pvio-ring", &[]),
    // 2: the three means of communication between domains
    ("pvio-grant-table", &["pvio-ring"]),
    ("pvio-event-channel", &["pvio-ring", "pvio-grant-table"]),
    ("pvio-xenbus", &["pvio-ring"]),
    ("pvio-xenstored", &["pvio-ring", "pvio-xenbus"]),
    // 2: the threads of a process: wait point, workers, rate limits
    ("pvio-runtime", &["pvio-ring"]),
    // 2: what a process may do, whatever it serves
    ("pvio-confinement", &[]),
    // 3: the devices, independent of the platform
    ("pvio-blkback", CORE),
    ("pvio-storage", STORAGE),
    ("pvio-netback", CORE),
    ("pvio-ports", PORTS),
    ("pvio-blkfront", DEVICE),
    ("pvio-netfront", DEVICE),
    // 3: the platforms, independent of the devices
    ("pvio-blockdev", &[]),
    ("pvio-imagefile", &[]),
    ("pvio-recordfile", &["pvio-ring", "pvio-runtime"]),
    ("pvio-hosted", HOSTED),
    ("pvio-sim", BELOW),
    ("pvio-xen-linux", BELOW),
    // 4: compositions of these. The daemon does not link the guest.
    ("pvio-daemon", DAEMON),
    ("pvio-demo", DEMO),
];

const BELOW: &[&str] =
    &["pvio-ring", "pvio-grant-table", "pvio-event-channel", "pvio-xenbus", "pvio-runtime"];
/// The core of a backend uses no files and no threads. With `std`, it rate-limits its log lines and
/// retries system calls.
const CORE: &[&str] =
    &["pvio-ring", "pvio-grant-table", "pvio-event-channel", "pvio-xenbus", "pvio-runtime"];
const STORAGE: &[&str] = &[
    "pvio-ring",
    "pvio-grant-table",
    "pvio-event-channel",
    "pvio-xenbus",
    "pvio-blkback",
    "pvio-runtime",
    "pvio-blockdev",
    "pvio-imagefile",
    "pvio-recordfile",
];
const PORTS: &[&str] = &[
    "pvio-ring",
    "pvio-grant-table",
    "pvio-event-channel",
    "pvio-xenbus",
    "pvio-netback",
    "pvio-runtime",
    "pvio-recordfile",
];
/// The hosted hypervisor serves xenstore to its domains. Its sockets are in a private directory, as
/// records are.
const HOSTED: &[&str] = &[
    "pvio-ring",
    "pvio-grant-table",
    "pvio-event-channel",
    "pvio-xenbus",
    "pvio-xenstored",
    "pvio-recordfile",
];
/// With `std`, a device depends on the wait point, a library for files, and the host's block
/// devices, which are not part of a domain's platform.
const DEVICE: &[&str] = &[
    "pvio-ring",
    "pvio-grant-table",
    "pvio-event-channel",
    "pvio-xenbus",
    "pvio-runtime",
    "pvio-blockdev",
    "pvio-imagefile",
    "pvio-recordfile",
];

const DAEMON: &[&str] = &[
    "pvio-ring",
    "pvio-grant-table",
    "pvio-event-channel",
    "pvio-xenbus",
    "pvio-blkback",
    "pvio-storage",
    "pvio-netback",
    "pvio-ports",
    "pvio-runtime",
    "pvio-recordfile",
    "pvio-confinement",
    "pvio-xen-linux",
];
const DEMO: &[&str] = &[
    "pvio-ring",
    "pvio-grant-table",
    "pvio-event-channel",
    "pvio-xenbus",
    "pvio-blkback",
    "pvio-storage",
    "pvio-blkfront",
    "pvio-netfront",
    "pvio-runtime",
    "pvio-recordfile",
    "pvio-hosted",
    "pvio-daemon",
];

/// The top layer: programs that compose, measure and check, and may depend on everything below.
const TOP: &[&str] = &["pvio", "pvio-benches", "xtask", "pvio-lab-agent", "pvio-simulator"];

/// Returns all dependencies that are not allowed.
pub fn check(packages: &[Package]) -> Vec<String> {
    let mut faults = Vec::new();
    for package in packages {
        let name = package.name.as_str();
        for need in package.needs.iter().chain(&package.tests_need) {
            if TOP.contains(&need.as_str()) {
                faults.push(format!("{name} depends on {need}, which is above every library"));
            }
        }
        if TOP.contains(&name) {
            continue;
        }
        let Some((_, allowed)) = MAY_NEED.iter().find(|(package, _)| *package == name) else {
            faults.push(format!("{name} has no layer: give it one in {}", file!()));
            continue;
        };
        // Tests compose as well: they may depend on everything except the top layer.
        for need in package.needs.iter().filter(|need| !allowed.contains(&need.as_str())) {
            faults.push(format!("{name} depends on {need}; it may on: {}", allowed.join(" ")));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, needs: &[&str], tests_need: &[&str]) -> Package {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Package {
            name: name.to_owned(),
            dir: "/".into(),
            needs: owned(needs),
            tests_need: owned(tests_need),
            roots: Vec::new(),
        }
    }

    #[test]
    fn dependency_on_higher_or_same_layer_is_reported() {
        assert_eq!(check(&[package("pvio-ring", &["pvio-grant-table"], &[])]).len(), 1);
        assert_eq!(check(&[package("pvio-blkback", &["pvio-hosted"], &[])]).len(), 1);
        assert_eq!(check(&[package("pvio-hosted", &["pvio-blkback"], &[])]).len(), 1);
        assert_eq!(check(&[package("pvio-ring", &[], &["pvio"])]).len(), 1);
        assert_eq!(check(&[package("pvio-new", &[], &[])]).len(), 1);
    }

    #[test]
    fn dependency_on_lower_layer_is_allowed() {
        let down = package("pvio-blkback", &["pvio-ring", "pvio-xenbus"], &["pvio-sim"]);
        assert_eq!(check(&[down, package("pvio", &["pvio-blkback"], &[])]), [""; 0]);
    }
}
