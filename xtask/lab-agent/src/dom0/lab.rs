//! The interface of a scenario to dom0.

use std::fs;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

pub use super::outcome::{Outcome, Skip};
pub use super::wait::{LONG, SHORT, wait_until};

use super::backend::{Backend, Backends, Words as ServeWords};
use super::disk::{Access, Disk, Medium};
use super::guest::{Guest, Kind, Programs, Spec};
use super::ledger::Ledger;
use super::words::{self, Words};

/// State of dom0 that scenarios work with.
pub struct Lab {
    /// The backend of the current scenario.
    pub backend: Backend,
    /// The guest type of the current scenario.
    pub kind: Kind,
    /// Measurements.
    pub rows: Vec<Value>,
    pub(crate) backends: Backends,
    pub(crate) shared: Option<Shared>,
    pub(crate) echoes: bool,
    pub(crate) words: Words,
}

/// A guest that several scenarios use one after another, and its disks.
pub struct Shared {
    /// The guest, with tools and fio, three disks and two NICs.
    pub guest: Guest,
    /// `xvda`: a block device, writable.
    pub disk: Disk,
    /// `xvdb`: a file where the backend can serve one, writable.
    pub file: Disk,
    /// `xvdc`: read-only.
    pub fixed: Disk,
    /// Their entries in the configuration.
    pub lines: Vec<String>,
    pub(crate) backend: Backend,
    pub(crate) kind: Kind,
}

impl Default for Lab {
    fn default() -> Self {
        Self {
            backend: Backend::Linux,
            kind: Kind::Pv,
            rows: Vec::new(),
            backends: Backends::default(),
            shared: None,
            echoes: false,
            words: Words::default(),
        }
    }
}

/// Size of the shared guest's writable disks in MiB.
pub const DISK_MIB: u64 = 64;
/// Size of the read-only disk in MiB.
pub const FIXED_MIB: u64 = 8;

impl Lab {
    /// Starts the backend of this scenario, with these arguments if it is pvio.
    ///
    /// # Errors
    /// It does not start.
    pub fn serve(&mut self, words: ServeWords) -> Result<()> {
        self.backends.serve(self.backend, words)
    }

    /// Returns the backends.
    pub fn backends(&mut self) -> &mut Backends {
        &mut self.backends
    }

    /// Returns the shared guest of this backend and guest type; creates it if it does not exist.
    ///
    /// # Errors
    /// It does not boot.
    pub fn shared(&mut self) -> Result<&mut Shared> {
        if self.shared.as_mut().is_some_and(|it| !it.guest.lives()) {
            self.drop_shared();
        }
        if self.shared.is_none() {
            let shared = Shared::start(self.backend, self.kind)?;
            self.shared = Some(shared);
        }
        Ok(self.shared.as_mut().expect("just made"))
    }

    /// Creates an image for this scenario's backend; returns it with its entry in the
    /// configuration.
    ///
    /// # Errors
    /// dom0 has no space.
    pub fn disk(&self, name: &str, mib: u64, medium: Medium) -> Result<(Disk, String)> {
        let disk = Disk::new(mib, self.backend, medium)?;
        let line = disk.line(name, Access::Write, self.backend)?;
        Ok((disk, line))
    }

    /// Returns the resources in use as soon as they do not change any more. Without a shared guest,
    /// there must be none of a guest.
    ///
    /// # Errors
    /// The resources keep changing, or some of a removed guest are left.
    pub fn settled(&mut self) -> Result<Ledger> {
        let ledger = Ledger::settled(self.backends.pvio())?;
        if self.shared.is_none() {
            ledger.no_guests()?;
        }
        Ok(ledger)
    }

    /// Checks that no resource of a device created since `before` is left.
    ///
    /// # Errors
    /// There is one after a timeout.
    pub fn nothing_left(&self, before: &Ledger) -> Result<()> {
        before.wait_for(self.backends.pvio(), Duration::from_secs(15))
    }

    /// Stops everything.
    pub fn close(&mut self) {
        self.drop_shared();
        if let Err(error) = self.backends.stop() {
            println!("PVIO-LAB {error:#}");
        }
    }

    /// Returns logs for the report of a failure.
    pub fn logs(&self) -> Value {
        self.words.all()
    }

    /// Ends a guest, and stores its last console lines for the report of a failure.
    ///
    /// # Errors
    /// Those of `end`.
    pub fn watched(
        &mut self,
        mut guest: Guest,
        end: impl FnOnce(&mut Guest) -> Result<()>,
    ) -> Result<()> {
        let ended = end(&mut guest);
        words::keep(&guest.name, &guest.log());
        ended
    }

    /// Powers the shared guest off, if there is one.
    ///
    /// # Errors
    /// It does not end.
    pub fn end_shared(&mut self) -> Result<()> {
        let Some(mut shared) = self.shared.take() else { return Ok(()) };
        shared.guest.power_off()
    }

    pub(crate) fn drop_shared(&mut self) {
        self.shared = None;
    }
}

/// A NIC on the bridge, as an entry of `vif=[…]`.
pub const NIC: &str = "bridge=xenbr0,script=vif-bridge";

impl Shared {
    fn start(backend: Backend, kind: Kind) -> Result<Self> {
        let disk = Disk::new(DISK_MIB, backend, Medium::Device)?;
        let file = Disk::new(DISK_MIB, backend, Medium::File)?;
        let fixed = Disk::new(FIXED_MIB, backend, Medium::Device)?;
        let mut bytes = vec![0; usize::try_from(FIXED_MIB << 20)?];
        crate::pattern::fill(&mut bytes, FIXED_SEED, 0);
        fs::write(&fixed.image, &bytes)?;
        let mut spec = Spec::new(kind, backend);
        spec.programs = Programs::Fio;
        let lines = vec![
            disk.line("xvda", Access::Write, backend)?,
            file.line("xvdb", Access::Write, backend)?,
            fixed.line("xvdc", Access::Read, backend)?,
        ];
        spec.disks.clone_from(&lines);
        spec.nics = vec![NIC.to_owned(); 2];
        let mut shared =
            Self { guest: Guest::start(&spec)?, disk, file, fixed, lines, backend, kind };
        shared.bring_up_nics()?;
        shared.guest.ask("echo-serve", Value::Null, SHORT)?;
        Ok(shared)
    }

    /// Sets up the addresses of both NICs.
    ///
    /// # Errors
    /// A NIC does not exist.
    pub fn bring_up_nics(&mut self) -> Result<()> {
        for (i, name) in ["eth0", "eth1"].iter().enumerate() {
            let address = format!("{}/24", address(&self.guest, i));
            self.guest.ask("nic-up", json!({ "name": name, "address": address }), SHORT)?;
        }
        Ok(())
    }
}

/// Seed of the contents of the shared guest's `xvdc`.
pub const FIXED_SEED: u64 = 77;
/// Returns the address of a guest's first or second NIC.
pub fn address(guest: &Guest, nic: usize) -> String {
    format!("10.0.{nic}.{}", 10 + guest.domain % 200)
}
