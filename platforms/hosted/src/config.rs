use crate::error::DomainError;
use crate::layout::{Frames, MAX_GRANT_FRAMES, MAX_MEMORY_PAGES, MAX_PORTS};
use pvio_grant_table::DomId;

/// Bytes in a domain's name at most.
const MAX_NAME: usize = 64;

/// What a domain is to be.
#[derive(Clone, Debug)]
pub struct DomainConfig {
    /// Its name: 1 to 64 letters, digits, or any of `-_.`; no two domains share one.
    pub name: String,
    /// Its number; the next free one from 1 if `None`. Domain 0 is the control domain.
    pub id: Option<DomId>,
    /// Pages of 4 KiB it has to share, 1 to 2²⁴ (64 GiB). They take memory only once used.
    pub memory_pages: u32,
    /// Frames of its grant table, 1 to 64; each has 512 entries, of which the first frame's first
    /// 8 are reserved.
    pub grant_frames: u32,
    /// Event channels it can have at the same time, 1 to 4095. Each takes two descriptors in the
    /// hypervisor's process.
    pub max_ports: u32,
}

impl DomainConfig {
    /// A domain with 64 MiB to share, 8 grant table frames and 1023 event channels.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        let name = name.into();
        Self { name, id: None, memory_pages: 16384, grant_frames: 8, max_ports: 1023 }
    }

    /// With a number of its own.
    #[must_use]
    pub fn id(self, id: DomId) -> Self {
        Self { id: Some(id), ..self }
    }

    /// With that many pages of 4 KiB to share.
    #[must_use]
    pub fn memory_pages(self, memory_pages: u32) -> Self {
        Self { memory_pages, ..self }
    }

    /// With that many grant table frames.
    #[must_use]
    pub fn grant_frames(self, grant_frames: u32) -> Self {
        Self { grant_frames, ..self }
    }

    /// With that many event channels at most.
    #[must_use]
    pub fn max_ports(self, max_ports: u32) -> Self {
        Self { max_ports, ..self }
    }

    pub(crate) fn check(&self) -> Result<Frames, DomainError> {
        let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if self.name.is_empty() || self.name.len() > MAX_NAME || !self.name.chars().all(good) {
            return Err(DomainError::BadName(self.name.clone()));
        }
        for (what, given, most) in [
            ("memory_pages", self.memory_pages, MAX_MEMORY_PAGES),
            ("grant_frames", self.grant_frames, MAX_GRANT_FRAMES),
            ("max_ports", self.max_ports, MAX_PORTS),
        ] {
            if !(1..=most).contains(&given) {
                return Err(DomainError::OutOfRange { what, given, least: 1, most });
            }
        }
        Frames::new(self.memory_pages, self.grant_frames).ok_or(DomainError::OutOfIds)
    }
}

/// What the hypervisor knows of a domain.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DomainInfo {
    /// Its number.
    pub id: DomId,
    /// Its name.
    pub name: String,
    /// The process that is this domain, if one is.
    pub pid: Option<i32>,
    /// Event channels it has.
    pub ports: usize,
}
