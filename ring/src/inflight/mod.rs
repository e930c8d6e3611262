//! The in-flight record: what a backend has taken from its rings and not visibly answered, in memory
//! that outlives the process.
//!
//! A backend that dies must be replaced without the guest noticing, and the ring alone cannot tell
//! the successor what to do: a response overwrites the slot of the oldest request without one, and
//! the guest can write every byte of it. So each device has a record beside its rings, in memory that
//! no peer reaches and that survives `SIGKILL` (a preallocated file, mapped shared).
//!
//! | item | contents |
//! |---|---|
//! | [`Record`] | the header: which session the record belongs to, whether it is valid, whether a flush has failed; and a section for each ring |
//! | [`RequestLog`] | the section of a ring whose requests complete in any order (blkif) |
//! | [`OrderedLog`] | the section of a ring whose requests are answered in the order they were made (netif) |
//!
//! # The protocol of a section, and why it is safe at every instruction
//!
//! Each transition is one aligned store. `SIGKILL` stops a process between two instructions and the
//! stores before it are in memory, so only the compiler has to be held back; `Release` is enough.
//!
//! 1. **Take.** The slot is copied once, from the ring into an entry, and parsed from there. Then the
//!    entry becomes [in flight](EntryState::InFlight). Killed before: the entry is free, and the request
//!    is still in the ring, unanswered.
//! 2. **Complete.** The response is stored in the entry, which then becomes done with the next response
//!    number `r`. Killed before: the request is submitted again. Block requests may be: a read or write
//!    that was done and not answered does no harm a second time, once the first one's I/O is over.
//! 3. **Publish.** The responses are copied to the slots `r mod N`, the producer index is stored, then
//!    `answered`. Killed before the index: slots `[index, taken)` may hold halves of responses, and are
//!    never read again; the responses are published from the record. Killed between index and
//!    `answered`: the index tells.
//! 4. **Resume.** With `p`, the producer index read once: `0 <= p - answered <=` the number of entries
//!    done with `r >= answered`, and those with `r >= p` are contiguous from `p`; anything else closes
//!    the device. `answered = p` is stored before an entry is used again.
//!
//! An [`OrderedLog`] needs no state for each entry: three numbers say how far it is. A packet that has left
//! cannot be called back, so a process killed between that and the store of `complete` has it sent a
//! second time; a network may do that.
//!
//! `tests/inflight` searches all interleavings of this code with a guest, killed at any store.

mod ordered;
mod record;
mod requests;

pub use ordered::{ORDERED_DEATHS_MAX, OrderedLog};
pub use record::{HEADER_WORDS, Record, SessionKey};
pub use requests::{EntryState, RequestLog, Resumed};

/// A record that cannot be used: the session it stands for is not resumed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RecordError {
    /// The memory is smaller than the session's record.
    #[error("the record has {found} bytes; this session takes {needed}")]
    Size {
        /// Bytes of memory.
        found: usize,
        /// Bytes that the session takes.
        needed: usize,
    },
    /// The process died while it wrote the header, or closed the session.
    #[error("the record is not valid: the session was never recorded as a whole, or it was closed")]
    Invalid,
    /// Another version of pvio wrote it.
    #[error("the record has version {found}; this program reads version {supported}")]
    Version {
        /// The version found.
        found: u64,
        /// The version that can be read.
        supported: u64,
    },
    /// It belongs to another session: other grant references, ports, or layout.
    #[error("the record belongs to another session of the device")]
    OtherSession,
    /// An entry holds what this code never writes.
    #[error("entry {entry} of the record holds a state that cannot be")]
    Entry {
        /// Its number.
        entry: u32,
    },
    /// The ring's response producer does not fit the record.
    #[error(
        "the ring's response producer is {produced}, and the record has {answered} responses \
         published and {done} more complete"
    )]
    Producer {
        /// `rsp_prod`, as read.
        produced: u32,
        /// Responses published, modulo 2³².
        answered: u32,
        /// Responses complete and not recorded as published.
        done: u32,
    },
    /// The numbers of a section that is answered in order contradict each other.
    #[error(
        "the record's numbers contradict each other: {answered} answered, {complete} complete, \
         {taken} taken"
    )]
    Numbers {
        /// Responses published.
        answered: u64,
        /// Requests that are done.
        complete: u64,
        /// Requests taken.
        taken: u64,
    },
    /// Responses that were complete and not published have gaps in their numbers.
    #[error("the record lacks a response between those that are complete")]
    Gap,
}

impl RecordError {
    /// A short stable code for logs, counters and `error` nodes.
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
