//! Distribution of received packets over a NIC's queues: receive-side scaling, with netif's names.

use alloc::vec::Vec;
use core::fmt;
use pvio_ring::proto::netif::{CtrlStatus, HASH_KEY_MAX, HashKind, HashTypes};
use pvio_ring::shm::PAGE_SIZE;

/// Maximum number of entries of a table: those that fit into one request's page. (Linux's netback
/// supports 128.)
pub const ENTRIES_MAX: usize = PAGE_SIZE / 4;

/// Maximum number of entries of the default table.
pub(crate) const ENTRIES_EVEN: u32 = 128;

/// A packet's hash, as the backend reports it; all packets of a flow have the same one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hash {
    /// Which fields were hashed.
    pub kind: HashKind,
    /// The hash.
    pub value: u32,
}

/// Which packets a backend hashes, and which queue each hash selects.
///
/// A sender that knows the key can choose the queue of its packets: use a random key, unless hashes
/// must equal those of another system.
#[derive(Clone, PartialEq, Eq)]
pub struct Steering {
    types: HashTypes,
    key: Vec<u8>,
    /// `None`: the default table, which uses all queues in turn.
    table: Option<Vec<u32>>,
}

/// Why a steering configuration is invalid for every backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SteeringError {
    /// No kind of packet is selected for hashing.
    #[error("no kind of packet is to be hashed")]
    NoTypes,
    /// A key of more than 40 bytes.
    #[error("a hash key has 40 bytes at most, not {0}")]
    Key(usize),
    /// A table of no entries, or of more than 1024.
    #[error("a table has 1 to 1024 entries, not {0}")]
    Table(usize),
}

impl Steering {
    /// Creates a configuration that hashes packets of these kinds with a key of up to 40 bytes
    /// (padded with zeroes), and distributes them evenly over all queues.
    ///
    /// # Errors
    /// [`SteeringError`].
    pub fn new(types: HashTypes, key: &[u8]) -> Result<Self, SteeringError> {
        if types.is_empty() {
            return Err(SteeringError::NoTypes);
        }
        if key.len() > HASH_KEY_MAX {
            return Err(SteeringError::Key(key.len()));
        }
        Ok(Self { types, key: key.into(), table: None })
    }

    /// Adds a table: a packet goes to queue `table[hash % table.len()]`.
    ///
    /// # Errors
    /// [`SteeringError`].
    pub fn with_table(mut self, table: &[u32]) -> Result<Self, SteeringError> {
        if table.is_empty() || table.len() > ENTRIES_MAX {
            return Err(SteeringError::Table(table.len()));
        }
        self.table = Some(table.into());
        Ok(self)
    }

    /// Returns the kinds of packets that are hashed.
    #[must_use]
    pub const fn types(&self) -> HashTypes {
        self.types
    }

    pub(crate) fn key(&self) -> &[u8] {
        &self.key
    }

    /// Returns the configured table.
    pub(crate) fn table(&self) -> Option<&[u32]> {
        self.table.as_deref()
    }
}

/// Omits the key, which should not appear in logs.
impl fmt::Debug for Steering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Steering")
            .field("types", &self.types)
            .field("table", &self.table)
            .finish_non_exhaustive()
    }
}

/// State of the steering that was requested with a [`Steering`]. If it is not in effect, the
/// backend chooses the queues.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum SteeringState {
    /// None was requested.
    #[default]
    Off,
    /// It is being configured.
    Pending,
    /// In effect: the backend has accepted all requests that configure it.
    On,
    /// Not supported: the backend has no control ring, or there is only one queue.
    NotOffered,
    /// The table names this queue, which the session does not have.
    NoQueue(u32),
    /// Of the requested kinds, the backend hashes only these.
    NoTypes(HashTypes),
    /// The backend's table has fewer entries: this number.
    NoEntries(u32),
    /// The backend rejected a request.
    Refused(Refusal),
}

/// A request that the backend rejected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// The request's type ([`ctrl_type`](pvio_ring::proto::netif::ctrl_type)).
    pub kind: u16,
    /// Status of the response: a [`CtrlStatus`], or an undefined value.
    pub status: u32,
}

impl Refusal {
    /// Returns the reason as a short stable code.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match CtrlStatus::from_number(self.status) {
            Some(status) => status.code(),
            None => "undefined",
        }
    }
}

impl fmt::Display for SteeringState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Pending => f.write_str("being set up"),
            Self::On => f.write_str("on"),
            Self::NotOffered => f.write_str("not offered"),
            Self::NoQueue(queue) => write!(f, "there is no queue {queue}"),
            Self::NoTypes(types) => write!(f, "only hash types {:#x} are there", types.bits()),
            Self::NoEntries(most) => write!(f, "the table has {most} entries at most"),
            Self::Refused(refusal) => {
                write!(f, "request {} refused: {}", refusal.kind, refusal.code())
            }
        }
    }
}
