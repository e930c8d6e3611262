//! Faults that are built into the code on purpose, to measure whether the simulator finds them. They
//! exist only in builds with `--cfg pvio_planted`.

extern crate std;

use std::cell::Cell;

macro_rules! faults {
    ($($name:ident: $text:literal,)+) => {
        /// A fault that can be planted.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Fault {
            $(#[doc = $text] $name,)+
        }

        impl Fault {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// Returns what it changes.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)+
                }
            }
        }
    };
}

faults! {
    PublishFence: "publishing reads the event index before it stores the producer index (removed fence)",
    FinalCheckFence: "the final check reads the producer index before it arms the event index (removed fence)",
    FinalCheck: "a backend sleeps without the final check (lost wake-up)",
    EventIndex: "a consumer arms the event index one too far",
    TakeoverNotNotified: "a successor does not notify the frontend after it takes over (lost wake-up)",
    ProducerBound: "a backend accepts any producer index of a frontend (missing bound)",
    ProducerFetchedTwice: "a backend reads the producer index again after it checked it (double fetch)",
    SectorBound: "requests beyond the end of the disk are accepted (missing bound)",
    SegmentBound: "segments beyond the end of their page are accepted (missing bound)",
    IndirectCount: "indirect requests with more segments than advertised are accepted (missing bound)",
    AnsweredFirst: "the record of a disk says that responses are published before they are",
    OrderedAnsweredFirst: "the record of a NIC says that responses are published before they are",
    ResponsesForgotten: "a successor loses responses that were complete and not published",
    InOrderResume: "a successor assumes that requests completed in order",
    CompleteNotStored: "a NIC's record does not say which requests are complete",
    TakenNotRecorded: "a NIC's record does not say which requests were taken",
    FlushErrorForgotten: "a failed flush is forgotten at once",
    FlushErrorNotRecorded: "a failed flush is forgotten when the process dies",
    StorageFence: "a successor does not wait for the I/O of the dead process (removed fence)",
    MappingLeaked: "the mappings of a request that fails are leaked (error path)",
    TablesLeaked: "a frontend does not end the grants of its segment tables (leak)",
    BacklogLeaked: "a NIC's backlog counts bytes of packets that have left (leaked budget)",
    GrantInUse: "a guest frees pages that the backend has still mapped (early free)",
    SplitRequest: "a frontend completes a request with the first of its parts",
    StaleServed: "a backend connects a frontend whose session was lost, without a new one",
    SessionLostIgnored: "a successor resumes a session that was given up",
    TransactionConflict: "xenstore commits transactions that conflict",
}

std::thread_local! {
    static PLANTED: Cell<Option<Fault>> = const { Cell::new(None) };
}

/// Plants a fault in the code that this thread executes, or none.
pub fn plant(fault: Option<Fault>) {
    PLANTED.set(fault);
}

/// Returns whether this thread has planted `fault`.
#[must_use]
pub fn is_planted(fault: Fault) -> bool {
    PLANTED.get() == Some(fault)
}
