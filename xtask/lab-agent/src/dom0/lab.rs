//! dom0 as a scenario sees it.

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

/// What scenarios work with.
pub struct Lab {
    /// Who serves now.
    pub backend: Backend,
    /// What kind of guest is asked for now.
    pub kind: Kind,
    /// What was measured.
    pub rows: Vec<Value>,
    pub(crate) backends: Backends,
    pub(crate) shared: Option<Shared>,
    pub(crate) echoes: bool,
    pub(crate) words: Words,
}

/// A guest several scenarios use one after another, and its disks.
pub struct Shared {
    /// With tools and fio, three disks and two NICs.
    pub guest: Guest,
    /// `xvda`: a device, to be written.
    pub disk: Disk,
    /// `xvdb`: a file where the backend can serve one, to be written.
    pub file: Disk,
    /// `xvdc`: to be read only.
    pub fixed: Disk,
    /// What `xl` was told of them.
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

/// MiB of the shared guest's disks.
pub const DISK_MIB: u64 = 64;
/// MiB of the disk that is only read.
pub const FIXED_MIB: u64 = 8;

impl Lab {
    /// Makes the backend of this scenario serve, with these words if it is pvio.
    ///
    /// # Errors
    /// It does not.
    pub fn serve(&mut self, words: ServeWords) -> Result<()> {
        self.backends.serve(self.backend, words)
    }

    /// The backends' processes.
    pub fn backends(&mut self) -> &mut Backends {
        &mut self.backends
    }

    /// The guest that is shared by the scenarios of this backend and kind, made if there is none.
    ///
    /// # Errors
    /// It does not come up.
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

    /// An image for this scenario's backend, and its line for `xl`.
    ///
    /// # Errors
    /// dom0 has no room.
    pub fn disk(&self, name: &str, mib: u64, medium: Medium) -> Result<(Disk, String)> {
        let disk = Disk::new(mib, self.backend, medium)?;
        let line = disk.line(name, Access::Write, self.backend)?;
        Ok((disk, line))
    }

    /// What is there of devices once nothing changes any more; nothing of a guest's, if there is
    /// no shared guest.
    ///
    /// # Errors
    /// It does not come to rest, or something is left of guests that are gone.
    pub fn settled(&mut self) -> Result<Ledger> {
        let ledger = Ledger::settled(self.backends.pvio())?;
        if self.shared.is_none() {
            ledger.no_guests()?;
        }
        Ok(ledger)
    }

    /// Checks that of all devices made since `before` nothing is left.
    ///
    /// # Errors
    /// Something is, after a while.
    pub fn nothing_left(&self, before: &Ledger) -> Result<()> {
        before.wait_for(self.backends.pvio(), Duration::from_secs(15))
    }

    /// Ends everything.
    pub fn close(&mut self) {
        self.drop_shared();
        if let Err(error) = self.backends.stop() {
            println!("PVIO-LAB {error:#}");
        }
    }

    /// What a person wants to read after a failure.
    pub fn logs(&self) -> Value {
        self.words.all()
    }

    /// Ends a guest, whose last words are kept to be shown if the scenario fails.
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

    /// Powers the shared guest off, if there is one, and checks that nothing of it is left.
    ///
    /// # Errors
    /// It does not go.
    pub fn end_shared(&mut self) -> Result<()> {
        let Some(mut shared) = self.shared.take() else { return Ok(()) };
        shared.guest.power_off()
    }

    pub(crate) fn drop_shared(&mut self) {
        self.shared = None;
    }
}

/// A NIC on the bridge.
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

    /// Gives both NICs their addresses.
    ///
    /// # Errors
    /// They are not there.
    pub fn bring_up_nics(&mut self) -> Result<()> {
        for (i, name) in ["eth0", "eth1"].iter().enumerate() {
            let address = format!("{}/24", address(&self.guest, i));
            self.guest.ask("nic-up", json!({ "name": name, "address": address }), SHORT)?;
        }
        Ok(())
    }
}

/// What `xvdc` of the shared guest holds.
pub const FIXED_SEED: u64 = 77;
/// The address of a guest's first or second NIC.
pub fn address(guest: &Guest, nic: usize) -> String {
    format!("10.0.{nic}.{}", 10 + guest.domain % 200)
}
