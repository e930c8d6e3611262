//! How received packets are to be spread over a NIC's queues: receive-side scaling, by netif's names.

use alloc::vec::Vec;
use core::fmt;
use pvio_ring::proto::netif::{CtrlStatus, HASH_KEY_MAX, HashKind, HashTypes};
use pvio_ring::shm::PAGE_SIZE;

/// Entries of the longest table: what stands in the page of one request. (Linux's netback takes 128.)
pub const ENTRIES_MAX: usize = PAGE_SIZE / 4;

/// Entries of a table that nobody gave, at most.
pub(crate) const ENTRIES_EVEN: u32 = 128;

/// A packet's hash, as the backend tells it: a flow's packets have the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hash {
    /// Which fields were hashed.
    pub kind: HashKind,
    /// The hash.
    pub value: u32,
}

/// What a backend is asked to hash, and which queue a hash goes to.
///
/// Whoever sends packets and knows the key can choose their queue: take a random one, unless hashes
/// have to be the same elsewhere.
#[derive(Clone, PartialEq, Eq)]
pub struct Steering {
    types: HashTypes,
    key: Vec<u8>,
    /// `None`: all queues by turns.
    table: Option<Vec<u32>>,
}

/// Why something cannot be asked of any backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SteeringError {
    /// No kind of packet is to be hashed.
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
    /// Packets of these kinds are hashed with a key of up to 40 bytes (the rest counts as 0), and go to
    /// all queues alike.
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

    /// The same with a table: a packet goes to queue `table[hash % table.len()]`.
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

    /// Which packets are hashed.
    #[must_use]
    pub const fn types(&self) -> HashTypes {
        self.types
    }

    pub(crate) fn key(&self) -> &[u8] {
        &self.key
    }

    /// The table that was given.
    pub(crate) fn table(&self) -> Option<&[u32]> {
        self.table.as_deref()
    }
}

/// Without the key, which is better kept from logs.
impl fmt::Debug for Steering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Steering")
            .field("types", &self.types)
            .field("table", &self.table)
            .finish_non_exhaustive()
    }
}

/// How far the backend goes by a [`Steering`]. If it does not, packets come as it likes, on any queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum SteeringState {
    /// None was asked for.
    #[default]
    Off,
    /// It is being set up.
    Pending,
    /// Packets are hashed, and come on the queue that the table says, by the backend's word.
    On,
    /// The backend has no control ring, or there is one queue only.
    NotOffered,
    /// The table names a queue that this session has not.
    NoQueue(u32),
    /// Of the kinds asked for the backend hashes only these.
    NoTypes(HashTypes),
    /// The backend's table has fewer entries: so many.
    NoEntries(u32),
    /// The backend refused a request.
    Refused(Refusal),
}

/// What a backend did not do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// The request's type ([`ctrl_type`](pvio_ring::proto::netif::ctrl_type)).
    pub kind: u16,
    /// Its answer: a [`CtrlStatus`], or what nobody defined.
    pub status: u32,
}

impl Refusal {
    /// Why, in a word.
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
