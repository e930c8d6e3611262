//! The packages, and the dependencies allowed between them.

use super::Package;

/// Each package of layers 1 to 4 and the packages of the workspace it may depend on. A dependency points
/// down, or sideways where two packages of one layer are made for each other.
const MAY_NEED: &[(&str, &[&str])] = &[
    // 1: shared memory, index arithmetic, wire formats
    ("pvio-ring", &[]),
    // 2: the three ways two domains meet
    ("pvio-grant-table", &["pvio-ring"]),
    ("pvio-event-channel", &["pvio-ring"]),
    ("pvio-xenbus", &["pvio-ring"]),
    ("pvio-xenstored", &["pvio-ring", "pvio-xenbus"]),
    // 3: the devices, which know no platform
    ("pvio-blkback", CORE),
    ("pvio-storage", STORAGE),
    ("pvio-netback", CORE),
    ("pvio-ports", PORTS),
    ("pvio-blkfront", DEVICE),
    ("pvio-netfront", DEVICE),
    // 3: the platforms, which know no device
    ("pvio-uring", &["pvio-ring"]),
    ("pvio-blockdev", &[]),
    ("pvio-imagefile", &[]),
    ("pvio-recordfile", &["pvio-ring"]),
    ("pvio-hosted", HOSTED),
    ("pvio-sim", BELOW),
    ("pvio-xen-linux", BELOW),
    // 4: what composes them. The daemon links no guest.
    ("pvio-daemon", DAEMON),
    ("pvio-demo", DEMO),
];

const BELOW: &[&str] = &["pvio-ring", "pvio-grant-table", "pvio-event-channel", "pvio-xenbus"];
/// The core of a backend knows no file and no thread. With std it limits its log lines and repeats calls.
const CORE: &[&str] =
    &["pvio-ring", "pvio-grant-table", "pvio-event-channel", "pvio-xenbus", "pvio-uring"];
const STORAGE: &[&str] = &[
    "pvio-ring",
    "pvio-grant-table",
    "pvio-event-channel",
    "pvio-xenbus",
    "pvio-blkback",
    "pvio-uring",
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
    "pvio-uring",
    "pvio-recordfile",
];
/// The hosted hypervisor serves xenstore to its domains, and its sockets are in a directory of the same kind
/// as records.
const HOSTED: &[&str] = &[
    "pvio-ring",
    "pvio-grant-table",
    "pvio-event-channel",
    "pvio-xenbus",
    "pvio-xenstored",
    "pvio-recordfile",
];
/// With std, a device waits in the one wait point, has files for a library, and devices of the host,
/// which are no platform of a domain's.
const DEVICE: &[&str] = &[
    "pvio-ring",
    "pvio-grant-table",
    "pvio-event-channel",
    "pvio-xenbus",
    "pvio-uring",
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
    "pvio-uring",
    "pvio-recordfile",
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
    "pvio-uring",
    "pvio-recordfile",
    "pvio-hosted",
    "pvio-daemon",
];

/// The top: it composes, measures and checks, so it may need anything below.
const TOP: &[&str] = &["pvio", "pvio-benches", "xtask", "pvio-lab-agent"];

/// Every dependency that points the wrong way.
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
        // Tests compose: they may depend on everything but the top.
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
    fn dependencies_up_or_across_are_found() {
        assert_eq!(check(&[package("pvio-ring", &["pvio-grant-table"], &[])]).len(), 1);
        assert_eq!(check(&[package("pvio-blkback", &["pvio-hosted"], &[])]).len(), 1);
        assert_eq!(check(&[package("pvio-hosted", &["pvio-blkback"], &[])]).len(), 1);
        assert_eq!(check(&[package("pvio-ring", &[], &["pvio"])]).len(), 1);
        assert_eq!(check(&[package("pvio-new", &[], &[])]).len(), 1);
    }

    #[test]
    fn a_dependency_down_is_allowed() {
        let down = package("pvio-blkback", &["pvio-ring", "pvio-xenbus"], &["pvio-sim"]);
        assert_eq!(check(&[down, package("pvio", &["pvio-blkback"], &[])]), [""; 0]);
    }
}
