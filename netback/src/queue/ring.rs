//! A ring whose responses are in the order of its requests, with its section of the in-flight
//! record.

use crate::fault::AttachError;
use pvio_ring::inflight::OrderedLog;
use pvio_ring::proto::netif::{RX_SLOT_SIZE, TX_RESPONSE_SIZE, TX_SLOT_SIZE};
use pvio_ring::shm::{PAGE_SIZE, SharedMemory};
use pvio_ring::{BackRing, RingFault, RingLayout, Slot};

/// Type of ring.
#[derive(Clone, Copy)]
pub(super) enum Direction {
    Transmit,
    Receive,
}

impl Direction {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Transmit => "transmit",
            Self::Receive => "receive",
        }
    }

    const fn slot_size(self) -> usize {
        match self {
            Self::Transmit => TX_SLOT_SIZE,
            Self::Receive => RX_SLOT_SIZE,
        }
    }

    const fn response_size(self) -> usize {
        match self {
            Self::Transmit => TX_RESPONSE_SIZE,
            Self::Receive => RX_SLOT_SIZE,
        }
    }

    /// Returns the size of its section in bytes. A vif's rings are one page each.
    pub fn section_len(self) -> usize {
        let layout = RingLayout::new(PAGE_SIZE, self.slot_size());
        layout.map_or(0, |layout| {
            OrderedLog::<&dyn SharedMemory>::section_len(layout, self.response_size())
        })
    }
}

/// Backend's view of a ring in memory `M`, with its record in `R`. Responses are not visible to the
/// guest until they are published.
pub(super) struct Ring<M, R> {
    back: BackRing<M>,
    log: OrderedLog<R>,
}

impl<M: SharedMemory, R: SharedMemory> Ring<M, R> {
    /// Attaches to a ring. If the session is resumed, continues at the position in the record.
    pub fn attach(
        memory: M,
        direction: Direction,
        section: R,
        resumed: bool,
    ) -> Result<Self, AttachError> {
        let ring = direction.name();
        let unusable = |fault| AttachError::Ring { ring, fault };
        let inconsistent = |error| AttachError::Record { ring, error };
        let mut back = BackRing::attach(memory, direction.slot_size()).map_err(unusable)?;
        let log = if resumed {
            let log = OrderedLog::resume(section, &back, direction.response_size());
            let log = log.map_err(inconsistent)?;
            back.resume(log.unanswered()).map_err(unusable)?;
            log
        } else {
            let log = OrderedLog::new(section, &back, direction.response_size());
            log.map_err(inconsistent)?
        };
        Ok(Self { back, log })
    }

    /// Returns the number of slots.
    pub fn slots(&self) -> usize {
        self.back.layout().slots() as usize
    }

    /// Returns the number of outstanding requests, as of the last read of the producer index.
    #[inline]
    pub fn waiting(&self) -> u32 {
        self.log.waiting(&self.back)
    }

    /// As [`BackRing::has_requests`].
    #[inline]
    pub fn has_requests(&mut self) -> Result<bool, RingFault> {
        self.log.has_requests(&mut self.back)
    }

    /// As [`BackRing::look`].
    #[inline]
    pub fn look(&mut self) -> Result<u32, RingFault> {
        self.log.look(&mut self.back)
    }

    /// As [`OrderedLog::take`].
    #[inline]
    pub fn take(&mut self) -> Result<Option<Slot<'_, R>>, RingFault> {
        self.log.take(&mut self.back)
    }

    /// As [`OrderedLog::gives_up`].
    #[inline]
    pub fn gives_up(&self) -> bool {
        self.log.gives_up()
    }

    /// As [`OrderedLog::given_up`].
    pub fn given_up(&self) -> u64 {
        self.log.given_up()
    }

    /// As [`OrderedLog::record_taken`].
    #[inline]
    pub fn record_taken(&mut self) {
        self.log.record_taken();
    }

    /// As [`OrderedLog::respond`].
    #[inline]
    pub fn respond(&mut self, response: &[u8]) {
        self.log.respond(response);
    }

    /// As [`OrderedLog::publish`].
    #[inline]
    pub fn publish(&mut self) -> bool {
        self.log.publish(&mut self.back)
    }

    /// As [`BackRing::final_check_for`].
    pub fn final_check_for(&mut self, needed: u32) -> Result<bool, RingFault> {
        self.log.final_check_for(&mut self.back, needed)
    }
}
