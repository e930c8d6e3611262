use crate::error::DomainError;
use crate::layout::{Frames, MAX_GRANT_FRAMES, MAX_MEMORY_PAGES, MAX_PORTS};
use pvio_grant_table::DomId;

/// Largest length of a domain's name in bytes.
const MAX_NAME: usize = 64;

/// Configuration of a domain.
#[derive(Clone, Debug)]
pub struct DomainConfig {
    /// Name: 1 to 64 letters, digits, or any of `-_.`; unique among the domains.
    pub name: String,
    /// Domain id; `None` selects the next free one from 1. Domain 0 is the control domain.
    pub id: Option<DomId>,
    /// Number of sharable pages of 4 KiB, 1 to 2²⁴ (64 GiB). They take memory only once used.
    pub memory_pages: u32,
    /// Number of grant table frames, 1 to 64. Each has 512 entries; the first 8 entries of the
    /// first frame are reserved.
    pub grant_frames: u32,
    /// Limit of concurrent event channels, 1 to 4095. Each takes three descriptors in the
    /// hypervisor's process.
    pub max_ports: u32,
    /// Whether the domain exists until it is
    /// [destroyed](crate::Hypervisor::destroy_domain), so that processes can join one after the
    /// other. Otherwise it is destroyed when its last connection ends.
    pub rejoinable: bool,
}

impl DomainConfig {
    /// Returns the configuration of a domain with 64 MiB of sharable pages, 8 grant table frames
    /// and 1023 event channels.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        let name = name.into();
        Self {
            name,
            id: None,
            memory_pages: 16384,
            grant_frames: 8,
            max_ports: 1023,
            rejoinable: false,
        }
    }

    /// Sets the domain id.
    #[must_use]
    pub fn id(self, id: DomId) -> Self {
        Self { id: Some(id), ..self }
    }

    /// Sets the number of sharable pages of 4 KiB.
    #[must_use]
    pub fn memory_pages(self, memory_pages: u32) -> Self {
        Self { memory_pages, ..self }
    }

    /// Sets the number of grant table frames.
    #[must_use]
    pub fn grant_frames(self, grant_frames: u32) -> Self {
        Self { grant_frames, ..self }
    }

    /// Sets the limit of event channels.
    #[must_use]
    pub fn max_ports(self, max_ports: u32) -> Self {
        Self { max_ports, ..self }
    }

    /// Sets whether processes can join one after the other.
    #[must_use]
    pub fn rejoinable(self, rejoinable: bool) -> Self {
        Self { rejoinable, ..self }
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

/// State of a domain, as the hypervisor reports it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DomainInfo {
    /// Domain id.
    pub id: DomId,
    /// Name.
    pub name: String,
    /// Id of the process that has joined as this domain.
    pub pid: Option<i32>,
    /// Number of open event channels.
    pub ports: usize,
    /// Number of device connections.
    pub devices: usize,
}
