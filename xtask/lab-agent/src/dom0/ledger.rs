//! Resources that must be released when a device is removed: nodes, grants, ports, interfaces,
//! threads, files.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::wait::wait_until;
use super::xs;
use crate::sys::{self, took};

const QUICK: Duration = Duration::from_secs(20);

/// Number of resources in use, by description.
#[derive(Debug, Default)]
pub struct Ledger(BTreeMap<String, usize>);

/// Delay between two counts that must be equal.
const PAUSE: Duration = Duration::from_millis(500);
/// Prefixes of resources that [`Ledger::outside`] does not count, or whose number depends on the
/// domains, which it does not count.
const LATER: [&str; 3] = ["domain ", "port to ", "mapping of "];

impl Ledger {
    /// Counts all resources. `pvio` is the daemon's process, if it is running.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn take(pvio: Option<u32>) -> Result<Self> {
        let mut ledger = Self::default();
        ledger.domains()?;
        ledger.ports()?;
        ledger.0.append(&mut Self::outside(pvio)?.0);
        Ok(ledger)
    }

    /// Counts the resources that need no program of Xen, as those start slowly under emulation.
    fn outside(pvio: Option<u32>) -> Result<Self> {
        let mut ledger = Self::default();
        ledger.nodes()?;
        ledger.interfaces()?;
        ledger.kernel_threads()?;
        if let Some(pid) = pvio {
            ledger.process(pid)?;
        }
        Ok(ledger)
    }

    /// Returns the resources as soon as two consecutive counts are equal.
    ///
    /// # Errors
    /// They keep changing.
    pub fn settled(pvio: Option<u32>) -> Result<Self> {
        let start = Instant::now();
        let mut last = Self::take(pvio)?;
        for _ in 0..40 {
            std::thread::sleep(PAUSE);
            let now = Self::take(pvio)?;
            if last.differences(&now).is_empty() {
                took::since(start, "until nothing changes");
                return Ok(now);
            }
            last = now;
        }
        bail!("things keep changing: {:?}", last.0)
    }

    /// Checks that there is no resource of any guest.
    ///
    /// # Errors
    /// There is; the text lists them.
    pub fn no_guests(&self) -> Result<()> {
        let of_guests = ["node ", "port to ", "interface vif", "kernel thread ", "mapping of "];
        let guest = |what: &&String| {
            let domain = what.strip_prefix("domain ").is_some_and(|it| it != "Domain-0 0");
            // An event channel between xenstored and the kernel within dom0.
            what.as_str() != "port to domain 0"
                && (domain || of_guests.iter().any(|start| what.starts_with(start)))
        };
        let left: Vec<_> = self.0.keys().filter(guest).map(String::as_str).collect();
        if left.is_empty() {
            return Ok(());
        }
        bail!("left of guests that are gone: {}", left.join("; "))
    }

    /// Waits until the resources in use are equal to these.
    ///
    /// # Errors
    /// They are not; the text lists the differences.
    pub fn wait_for(&self, pvio: Option<u32>, patience: Duration) -> Result<()> {
        // Programs of Xen are only run once everything else is equal.
        let start = Instant::now();
        let later = |what: &str| LATER.iter().any(|start| what.starts_with(start));
        wait_until(patience, || {
            Ok(self.differences(&Self::outside(pvio)?).iter().all(|what| later(what)))
        })?;
        let mut now = Self::default();
        let mut whats: Vec<String> = Vec::new();
        wait_until(patience, || {
            now = Self::take(pvio)?;
            whats = self.differences(&now);
            Ok(whats.is_empty())
        })?;
        took::since(start, "until all is as it was");
        if whats.is_empty() {
            return Ok(());
        }
        let count = |ledger: &Self, what: &str| ledger.0.get(what).copied().unwrap_or_default();
        let lines: Vec<_> = whats
            .iter()
            .map(|what| format!("{what}: {} before, {} now", count(self, what), count(&now, what)))
            .collect();
        bail!("left behind after {} s: {}", patience.as_secs(), lines.join("; "))
    }

    /// Returns the resources whose numbers differ. The number of mapped pages of running guests
    /// varies with their load, so it is ignored.
    fn differences(&self, other: &Self) -> Vec<String> {
        let guests = |ledger: &Self| ledger.0.keys().any(|what| what.starts_with("domain guest"));
        let living = guests(self) && guests(other);
        let mut whats: Vec<_> = self.0.keys().chain(other.0.keys()).cloned().collect();
        whats.sort();
        whats.dedup();
        whats.retain(|what| self.0.get(what) != other.0.get(what));
        whats.retain(|what| !(living && what.starts_with("mapping of ")));
        whats
    }

    fn add(&mut self, what: impl Into<String>) {
        *self.0.entry(what.into()).or_default() += 1;
    }

    /// A domain that was destroyed but still exists has pages that are mapped through grants.
    fn domains(&mut self) -> Result<()> {
        let listed = sys::succeed(&["xl", "list"], QUICK)?;
        for line in listed.lines().skip(1) {
            let mut words = line.split_whitespace();
            let (name, id) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            self.add(format!("domain {name} {id}"));
        }
        Ok(())
    }

    fn nodes(&mut self) -> Result<()> {
        for kind in ["vbd", "vif", "qdisk"] {
            for domain in xs::list(&format!("/local/domain/0/backend/{kind}"))? {
                self.add(format!("node backend/{kind}/{domain}"));
            }
        }
        Ok(())
    }

    /// Event channels between dom0 and another domain.
    fn ports(&mut self) -> Result<()> {
        let listed = sys::succeed(&["lsevtchn", "0"], QUICK)?;
        for line in listed.lines().filter(|line| line.contains("Interdomain")) {
            // The format is `  12: VCPU 0: Interdomain (Connected) - Remote Domain 3, Port 8`.
            let domain = line.split("Remote Domain ").nth(1).unwrap_or_default();
            let domain = domain.split(',').next().unwrap_or_default();
            self.add(format!("port to domain {domain}"));
        }
        Ok(())
    }

    fn interfaces(&mut self) -> Result<()> {
        for entry in fs::read_dir("/sys/class/net")? {
            self.add(format!("interface {}", entry?.file_name().display()));
        }
        Ok(())
    }

    /// Such as `1.xvda-0` of xen-blkback and `vif1.0-q0-guest-rx` of xen-netback.
    fn kernel_threads(&mut self) -> Result<()> {
        for entry in fs::read_dir("/proc")?.flatten() {
            let comm = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            let comm = comm.trim();
            if comm.starts_with("vif") || comm.contains(".xvd") {
                self.add(format!("kernel thread {comm}"));
            }
        }
        Ok(())
    }

    fn process(&mut self, pid: u32) -> Result<()> {
        for entry in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            let comm = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            // The kernel decides when it ends io_uring's worker threads.
            if !comm.starts_with("iou-") {
                self.add(format!("thread {}", comm.trim()));
            }
        }
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            let target = fs::read_link(entry.path()).unwrap_or_default();
            // The targets of sockets and pipes contain a unique number.
            let target = target.display().to_string();
            let kind = target.split(":[").next().unwrap_or_default();
            self.add(format!("descriptor {kind}"));
        }
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        for line in maps.lines().filter(|line| line.contains("/dev/xen/")) {
            let device = line.split_whitespace().last().unwrap_or_default();
            self.add(format!("mapping of {device}"));
        }
        Ok(())
    }
}
