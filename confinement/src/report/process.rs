//! Reading `/proc`.

use super::descriptors::descriptors;
use super::{Capabilities, Memory, Report, SeccompMode};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Namespaces in `/proc/PID/ns`.
const NAMESPACES: [&str; 7] = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"];

impl Report {
    /// Reads the report of a process. Some parts need the right to trace it: namespaces,
    /// descriptors, memory.
    ///
    /// # Errors
    /// There is no such process, or `/proc` cannot be read.
    pub fn of(pid: u32) -> io::Result<Self> {
        Self::of_directory(Path::new("/proc"), pid)
    }

    fn of_directory(proc: &Path, pid: u32) -> io::Result<Self> {
        let directory = proc.join(pid.to_string());
        let text = fs::read_to_string(directory.join("status"))?;
        let status = Status::parse(&text);
        let uids = status.numbers("Uid");
        let owner = fs::metadata(directory.join("status"))?.uid();
        let namespaces = NAMESPACES.iter().filter_map(|name| {
            let of = |process: &str| fs::read_link(proc.join(process).join("ns").join(name)).ok();
            Some(((*name).to_owned(), of(&pid.to_string())? != of("self")?))
        });
        Ok(Self {
            pid,
            name: status.text("Name").to_owned(),
            threads: status.number("Threads"),
            gids: status.numbers("Gid"),
            groups: status.numbers("Groups"),
            capabilities: Capabilities {
                inheritable: status.mask("CapInh"),
                permitted: status.mask("CapPrm"),
                effective: status.mask("CapEff"),
                bounding: status.mask("CapBnd"),
                ambient: status.mask("CapAmb"),
            },
            no_new_privileges: status.number("NoNewPrivs") == 1,
            seccomp: seccomp(&status),
            threads_without_seccomp: unfiltered_threads(&directory)?,
            // Files of a process that is not dumpable belong to root.
            dumpable: uids.get(1).filter(|uid| **uid != 0).map(|uid| owner == *uid),
            own_namespaces: namespaces.collect(),
            root_entries: fs::read_dir(directory.join("root")).ok().map(|all| all.count() as u64),
            limits: limits(&fs::read_to_string(directory.join("limits"))?),
            cgroups: cgroups(&fs::read_to_string(directory.join("cgroup")).unwrap_or_default()),
            descriptors: descriptors(&directory.join("fd")),
            memory: fs::read_to_string(directory.join("smaps_rollup")).ok().map(|t| memory(&t)),
            applied: None,
            uids,
        })
    }
}

/// `/proc/PID/status`, or another file of lines `key: value`.
pub struct Status<'a>(BTreeMap<&'a str, &'a str>);

impl<'a> Status<'a> {
    pub fn parse(text: &'a str) -> Self {
        let fields = text.lines().filter_map(|line| line.split_once(':'));
        Self(fields.map(|(key, value)| (key.trim(), value.trim())).collect())
    }

    fn text(&self, key: &str) -> &'a str {
        self.0.get(key).copied().unwrap_or_default()
    }

    /// Returns the first number of a field; a unit may follow.
    fn number(&self, key: &str) -> u64 {
        let first = self.text(key).split_whitespace().next();
        first.and_then(|number| number.parse().ok()).unwrap_or_default()
    }

    fn numbers(&self, key: &str) -> Vec<u32> {
        self.text(key).split_whitespace().filter_map(|number| number.parse().ok()).collect()
    }

    pub fn mask(&self, key: &str) -> u64 {
        // A mask that cannot be read must not look like an empty one.
        u64::from_str_radix(self.text(key), 16).unwrap_or(u64::MAX)
    }
}

fn seccomp(status: &Status<'_>) -> SeccompMode {
    match status.number("Seccomp") {
        1 => SeccompMode::Strict,
        2 => SeccompMode::Filter,
        _ => SeccompMode::Disabled,
    }
}

fn unfiltered_threads(directory: &Path) -> io::Result<u64> {
    let mut count = 0;
    for thread in fs::read_dir(directory.join("task"))? {
        match fs::read_to_string(thread?.path().join("status")) {
            Ok(text) => {
                count += u64::from(seccomp(&Status::parse(&text)) == SeccompMode::Disabled);
            }
            // The thread has ended.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(count)
}

/// Reads `/proc/PID/limits`: columns name, soft limit, hard limit, unit.
pub fn limits(text: &str) -> BTreeMap<String, [Option<u64>; 2]> {
    let lines = text.lines().skip(1).filter_map(|line| {
        let (name, values) = line.split_at_checked(26)?;
        let name = name.trim().strip_prefix("Max ")?.replace(' ', "-");
        let mut values = values.split_whitespace().map(|value| value.parse().ok());
        Some((name, [values.next()?, values.next()?]))
    });
    lines.collect()
}

/// Reads `/proc/PID/cgroup`: lines `number:controllers:path`.
fn cgroups(text: &str) -> BTreeMap<String, String> {
    let lines = text.lines().filter_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let name = if controllers.is_empty() { "unified" } else { controllers };
        Some((name.to_owned(), path.to_owned()))
    });
    lines.collect()
}

pub fn memory(text: &str) -> Memory {
    let fields = Status::parse(text);
    Memory {
        pss_kib: fields.number("Pss"),
        rss_kib: fields.number("Rss"),
        locked_kib: fields.number("Locked"),
    }
}
