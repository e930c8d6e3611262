//! The in-flight record: the requests that a backend has taken from its rings and whose responses
//! are not visible, in memory that persists when the process dies.
//!
//! A backend that dies must be replaced transparently to the guest. The ring does not contain
//! enough information for that: a response overwrites the slot of the oldest request without one,
//! and the guest can write every byte of the ring. So each device has a record in addition to its
//! rings, in memory that no peer can access and that survives `SIGKILL` (a preallocated file,
//! mapped shared).
//!
//! | item | contents |
//! |---|---|
//! | [`Record`] | the header: session key, validity, whether a flush has failed; and a section for each ring |
//! | [`RequestLog`] | the section of a ring whose requests complete in any order (blkif) |
//! | [`OrderedLog`] | the section of a ring whose requests complete in order (netif) |
//!
//! # The protocol of a section, and why it is crash-consistent at every instruction
//!
//! Each transition is one aligned store. `SIGKILL` stops a process between two instructions, and
//! the stores before it are in memory, so only reordering by the compiler must be prevented;
//! `Release` is sufficient.
//!
//! 1. **Take.** The slot is copied once, from the ring into an entry, and parsed from there. Then
//!    the entry becomes [in flight](EntryState::InFlight). If killed before that, the entry is
//!    free, and the request is still in the ring, without a response.
//! 2. **Complete.** The response is stored in the entry, which then becomes done with the next
//!    response number `r`. If killed before that, the request is submitted again. This is valid for
//!    block requests: repeating a read or write that was done and has no response is harmless once
//!    the first one's I/O has finished.
//! 3. **Publish.** The responses are copied to the slots `r mod N`, the producer index is stored,
//!    then `answered`. If killed before the index is stored, slots `[index, taken)` may hold
//!    partial responses, and are never read again; the responses are published from the record. If
//!    killed between index and `answered`, the index shows what is published.
//! 4. **Resume.** With `p`, the producer index read once: `0 <= p - answered <=` the number of entries
//!    done with `r >= answered`, and those with `r >= p` are contiguous from `p`; anything else closes
//!    the device. `answered = p` is stored before an entry is used again.
//!
//! An [`OrderedLog`] needs no state per entry: three numbers describe its progress. A packet that
//! was sent cannot be recalled, so if the process is killed between sending it and storing
//! `complete`, the packet is sent a second time; networks allow that.
//!
//! `tests/inflight` explores all interleavings of this code with a guest, killed at any store.

mod ordered;
mod record;
mod requests;

pub use ordered::{ORDERED_DEATHS_MAX, OrderedLog};
pub use record::{CURRENT_RECORD, HEADER_WORDS, OLDEST_RECORD, Record, SessionKey};
pub use requests::{EntryState, RequestLog, Resumed};

/// Why a record cannot be used: its session is not resumed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RecordError {
    /// The memory is smaller than the session's record.
    #[error("the record has {found} bytes, and this session needs {needed}")]
    Size {
        /// Size of the memory, in bytes.
        found: usize,
        /// Size that the session needs, in bytes.
        needed: usize,
    },
    /// The process died while it wrote the header, or closed the session.
    #[error("the record is not valid: the session was never recorded as a whole, or it was closed")]
    Invalid,
    /// The record was written by another version of pvio.
    #[error("the record has version {found}, and this program reads version {supported}")]
    Version {
        /// Version of the record.
        found: u64,
        /// Version that this program supports.
        supported: u64,
    },
    /// The record belongs to another session: other grant references, ports, or layout.
    #[error("the record belongs to another session of the device")]
    OtherSession,
    /// An entry holds a state that this code never writes.
    #[error("entry {entry} of the record has an invalid state")]
    Entry {
        /// Number of the entry.
        entry: u32,
    },
    /// The ring's response producer is inconsistent with the record.
    #[error(
        "the ring's response producer is {produced}, and the record has {answered} responses \
         published and {done} more complete"
    )]
    Producer {
        /// `rsp_prod`, as read.
        produced: u32,
        /// Number of responses published, modulo 2³².
        answered: u32,
        /// Number of responses complete and not recorded as published.
        done: u32,
    },
    /// The numbers of an ordered section contradict each other.
    #[error(
        "the record's numbers contradict each other: {answered} answered, {complete} complete, \
         {taken} taken"
    )]
    Numbers {
        /// Number of responses published.
        answered: u64,
        /// Number of requests that are done.
        complete: u64,
        /// Number of requests taken.
        taken: u64,
    },
    /// The numbers of the responses that were complete and not published have gaps.
    #[error("the record lacks a response between those that are complete")]
    Gap,
}

impl RecordError {
    /// Returns a short stable code for logs, counters and `error` nodes.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Size { .. } => "record-size",
            Self::Invalid => "record-invalid",
            Self::Version { .. } => "record-version",
            Self::OtherSession => "record-other-session",
            Self::Entry { .. } => "record-entry",
            Self::Producer { .. } => "record-producer",
            Self::Numbers { .. } => "record-numbers",
            Self::Gap => "record-gap",
        }
    }
}
