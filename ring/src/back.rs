//! The backend side of a ring: it consumes requests and produces responses.

use crate::directions::{Requests, Responses};
use crate::indices::{self, IndexMemory};
use crate::layout::{Full, RingFault, RingLayout};
use crate::shm::slot::Slot;
use crate::shm::{RingMemory, SharedMemory};

/// The backend side of a shared ring (`BACK_RING` in `ring.h`). Indices are free-running and wrap
/// at 2³². Nothing is visible to the frontend until [`publish`](Self::publish).
#[derive(Debug)]
pub struct BackRing<M> {
    ring: RingMemory<M>,
    /// Number of requests taken.
    req_cons: u32,
    /// The frontend's request producer as last read; requests before it are taken without reading
    /// shared memory.
    req_seen: u32,
    /// Number of responses written, published or not.
    rsp_prod: u32,
    /// Number of responses that are published.
    rsp_published: u32,
}

impl<M: SharedMemory> BackRing<M> {
    /// Attaches to a ring that the frontend has initialized, **at the response producer stored in
    /// it** (`BACK_RING_ATTACH`). On a ring in use, the backend continues where the previous one
    /// stopped, and completes every request that has no response. `slot_size` is the larger of
    /// request and response, in bytes.
    ///
    /// # Errors
    /// [`RingFault::Geometry`]; [`RingFault::ProducerOverflow`] if more requests are outstanding
    /// than the ring holds.
    pub fn attach(mem: M, slot_size: usize) -> Result<Self, RingFault> {
        let ring = RingMemory::new(mem, slot_size)?;
        let start = Responses(&ring).load_prod();
        let mut back =
            Self { ring, req_cons: start, req_seen: start, rsp_prod: start, rsp_published: start };
        back.refresh()?;
        Ok(back)
    }

    /// Continues after a previous backend that had taken `taken` requests more than it published
    /// responses. Their slots are not read again. To be called once, after
    /// [`attach`](Self::attach).
    ///
    /// # Errors
    /// [`RingFault::ProducerOverflow`] if the frontend's request producer is before the requests
    /// that were taken, or further ahead than the ring holds.
    pub fn resume(&mut self, taken: u32) -> Result<(), RingFault> {
        self.req_cons = self.req_cons.wrapping_add(taken);
        self.refresh().map(drop)
    }

    /// Returns the number of responses written, published or not: the index of the next one.
    #[must_use]
    pub fn produced(&self) -> u32 {
        self.rsp_prod
    }

    /// Returns the number of available requests, as of the last read of the producer index.
    #[inline]
    #[must_use]
    pub fn waiting(&self) -> u32 {
        self.req_seen.wrapping_sub(self.req_cons)
    }

    /// Returns the number of requests taken that have no response.
    #[inline]
    #[must_use]
    pub fn unanswered(&self) -> u32 {
        self.req_cons.wrapping_sub(self.rsp_prod)
    }

    /// Takes the next request, if there is one. Its slot remains valid until as many responses as
    /// requests up to it have been published.
    ///
    /// # Errors
    /// [`RingFault::ProducerOverflow`] if the frontend's producer index is further ahead than the
    /// ring holds.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<Slot<'_, M>>, RingFault> {
        if self.req_cons == self.req_seen && !self.refresh()? {
            return Ok(None);
        }
        let at = self.req_cons;
        self.req_cons = self.req_cons.wrapping_add(1);
        Ok(Some(Slot::new(self.ring.slot(at))))
    }

    /// Returns whether a request is available. Reads shared memory only if no request is left of
    /// those last seen.
    ///
    /// # Errors
    /// As [`pop`](Self::pop).
    #[inline]
    pub fn has_requests(&mut self) -> Result<bool, RingFault> {
        Ok(self.req_cons != self.req_seen || self.refresh()?)
    }

    /// Reads the producer index from shared memory, and returns the number of available requests.
    /// Both sides write the cache line of the indices. So reading it once and taking all available
    /// requests is cheaper than taking requests until there is none.
    ///
    /// # Errors
    /// As [`pop`](Self::pop).
    #[inline]
    pub fn look(&mut self) -> Result<u32, RingFault> {
        self.refresh()?;
        Ok(self.waiting())
    }

    /// Writes one response. It is not visible before [`publish`](Self::publish). A response uses
    /// the slot of the oldest request without one, whichever request it completes.
    ///
    /// # Errors
    /// [`Full`] if every request taken has a response, or if the response is larger than a slot.
    #[inline]
    pub fn push(&mut self, response: &[u8]) -> Result<(), Full> {
        if self.unanswered() == 0 {
            return Err(Full);
        }
        let mut slot = self.ring.slot_mut(self.rsp_prod);
        slot.write(response).ok_or(Full)?;
        self.rsp_prod = self.rsp_prod.wrapping_add(1);
        Ok(())
    }

    /// Publishes every pushed response, and returns whether the frontend must be notified
    /// (`RING_PUSH_RESPONSES_AND_CHECK_NOTIFY`). To be called once per batch; does nothing if
    /// nothing is new.
    #[inline]
    #[must_use = "a frontend that asked to be notified sleeps until it is"]
    pub fn publish(&mut self) -> bool {
        if self.rsp_published == self.rsp_prod {
            return false;
        }
        let old = core::mem::replace(&mut self.rsp_published, self.rsp_prod);
        indices::publish(&Responses(&self.ring), old, self.rsp_prod)
    }

    /// Arms a notification for the next request and checks again for requests
    /// (`RING_FINAL_CHECK_FOR_REQUESTS`). To be called before waiting for an event; wait only if it
    /// returns `false`.
    ///
    /// # Errors
    /// As [`pop`](Self::pop).
    #[inline]
    pub fn final_check(&mut self) -> Result<bool, RingFault> {
        if self.req_cons != self.req_seen {
            return Ok(true);
        }
        if crate::planted!(FinalCheck) {
            return Ok(false);
        }
        let prod = indices::ask_for_event(&Requests(&self.ring), self.req_cons);
        self.accept(prod)
    }

    /// Checks as [`final_check`](Self::final_check) does, for a backend that needs at least
    /// `needed` requests to proceed (the receive buffers of a packet): arms a notification for that
    /// number. Wait only if it returns `false`.
    ///
    /// # Errors
    /// As [`pop`](Self::pop).
    pub fn final_check_for(&mut self, needed: u32) -> Result<bool, RingFault> {
        if self.waiting() >= needed {
            return Ok(true);
        }
        let last = self.req_cons.wrapping_add(needed.saturating_sub(1));
        let prod = indices::ask_for_event(&Requests(&self.ring), last);
        self.accept(prod)?;
        Ok(self.waiting() >= needed)
    }

    /// Returns the ring's geometry.
    #[must_use]
    pub fn layout(&self) -> RingLayout {
        self.ring.layout()
    }

    #[inline]
    fn refresh(&mut self) -> Result<bool, RingFault> {
        let prod = Requests(&self.ring).load_prod();
        self.accept(prod)
    }

    /// Accepts a request producer only if it is at most a ring's size ahead of the responses.
    #[inline]
    fn accept(&mut self, prod: u32) -> Result<bool, RingFault> {
        let ahead = prod.wrapping_sub(self.req_cons);
        let most = self.ring.layout().slots().saturating_sub(self.unanswered());
        if ahead > most && !crate::planted!(ProducerBound) {
            return Err(RingFault::ProducerOverflow { prod, ahead, most });
        }
        let again = crate::planted!(ProducerFetchedTwice);
        self.req_seen = if again { Requests(&self.ring).load_prod() } else { prod };
        Ok(ahead != 0)
    }
}
