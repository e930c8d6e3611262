//! The backend's end of a ring: it consumes requests and produces responses.

use crate::directions::{Requests, Responses};
use crate::indices::{self, IndexMemory};
use crate::layout::{Full, RingFault, RingLayout};
use crate::shm::slot::Slot;
use crate::shm::{RingMemory, SharedMemory};

/// The backend's end of a shared ring (`BACK_RING` in `ring.h`). Indices run free and wrap at
/// 2³². Nothing is visible to the frontend until [`publish`](Self::publish).
#[derive(Debug)]
pub struct BackRing<M> {
    ring: RingMemory<M>,
    /// Requests taken.
    req_cons: u32,
    /// The frontend's request producer as last read; requests before it need no shared read.
    req_seen: u32,
    /// Responses written, published or not.
    rsp_prod: u32,
    /// Responses the frontend can see.
    rsp_published: u32,
}

impl<M: SharedMemory> BackRing<M> {
    /// Attaches to a ring the frontend has made, **at the response producer found in it**
    /// (`BACK_RING_ATTACH`): a ring in use goes on where its last backend stopped, answering every
    /// request that has no response yet. `slot_size` is the larger of request and response.
    ///
    /// # Errors
    /// [`RingFault::Geometry`]; [`RingFault::ProducerOverflow`] when more requests are waiting
    /// than the ring holds.
    pub fn attach(mem: M, slot_size: usize) -> Result<Self, RingFault> {
        let ring = RingMemory::new(mem, slot_size)?;
        let start = Responses(&ring).load_prod();
        let mut back =
            Self { ring, req_cons: start, req_seen: start, rsp_prod: start, rsp_published: start };
        back.refresh()?;
        Ok(back)
    }

    /// Goes on where a predecessor was that had taken `taken` requests more than it has published
    /// responses. Their slots are not read again. To be called once, after [`attach`](Self::attach).
    ///
    /// # Errors
    /// [`RingFault::ProducerOverflow`] when the frontend claims to have made fewer requests than were
    /// taken from it, or more than the ring holds.
    pub fn resume(&mut self, taken: u32) -> Result<(), RingFault> {
        self.req_cons = self.req_cons.wrapping_add(taken);
        self.refresh().map(drop)
    }

    /// Responses written, published or not: the index of the next one.
    #[must_use]
    pub fn produced(&self) -> u32 {
        self.rsp_prod
    }

    /// Requests waiting as far as the last look at shared memory showed.
    #[inline]
    #[must_use]
    pub fn waiting(&self) -> u32 {
        self.req_seen.wrapping_sub(self.req_cons)
    }

    /// Requests taken that were not answered yet.
    #[inline]
    #[must_use]
    pub fn unanswered(&self) -> u32 {
        self.req_cons.wrapping_sub(self.rsp_prod)
    }

    /// Takes the next request, if there is one. Its slot stays readable until as many responses as
    /// requests up to it have been published.
    ///
    /// # Errors
    /// [`RingFault::ProducerOverflow`] when the frontend claims more requests than fit.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<Slot<'_, M>>, RingFault> {
        if self.req_cons == self.req_seen && !self.refresh()? {
            return Ok(None);
        }
        let at = self.req_cons;
        self.req_cons = self.req_cons.wrapping_add(1);
        Ok(Some(Slot::new(self.ring.slot(at))))
    }

    /// Whether a request is waiting. Reads shared memory only when the last look is used up.
    ///
    /// # Errors
    /// As [`pop`](Self::pop).
    #[inline]
    pub fn has_requests(&mut self) -> Result<bool, RingFault> {
        Ok(self.req_cons != self.req_seen || self.refresh()?)
    }

    /// Looks at shared memory for requests newer than the last look, and returns how many wait.
    /// The indices share one cache line, which both sides write: to look once and take as many as
    /// there are is cheaper than to take until there is none.
    ///
    /// # Errors
    /// As [`pop`](Self::pop).
    #[inline]
    pub fn look(&mut self) -> Result<u32, RingFault> {
        self.refresh()?;
        Ok(self.waiting())
    }

    /// Writes one response. Not visible before [`publish`](Self::publish). A response takes the
    /// slot of the oldest request that has none, whichever request it answers.
    ///
    /// # Errors
    /// [`Full`] when every request taken has its response, or the response is larger than a slot.
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

    /// Shows every pushed response to the frontend, and tells whether it must be notified
    /// (`RING_PUSH_RESPONSES_AND_CHECK_NOTIFY`). Call once a batch; does nothing if nothing is new.
    #[inline]
    #[must_use = "a frontend that asked to be notified sleeps until it is"]
    pub fn publish(&mut self) -> bool {
        if self.rsp_published == self.rsp_prod {
            return false;
        }
        let old = core::mem::replace(&mut self.rsp_published, self.rsp_prod);
        indices::publish(&Responses(&self.ring), old, self.rsp_prod)
    }

    /// To be called before waiting for an event: asks to be notified of the next request and looks
    /// once more (`RING_FINAL_CHECK_FOR_REQUESTS`). Wait only if it says `false`.
    ///
    /// # Errors
    /// As [`pop`](Self::pop).
    #[inline]
    pub fn final_check(&mut self) -> Result<bool, RingFault> {
        if self.req_cons != self.req_seen {
            return Ok(true);
        }
        let prod = indices::ask_for_event(&Requests(&self.ring), self.req_cons);
        self.accept(prod)
    }

    /// Like [`final_check`](Self::final_check), for a backend that can do nothing with fewer than
    /// `needed` requests (a packet's worth of receive buffers): asks to be notified when there are
    /// as many. Wait only if it says `false`.
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

    /// The ring's geometry.
    #[must_use]
    pub fn layout(&self) -> RingLayout {
        self.ring.layout()
    }

    #[inline]
    fn refresh(&mut self) -> Result<bool, RingFault> {
        let prod = Requests(&self.ring).load_prod();
        self.accept(prod)
    }

    /// Believes a request producer only as far as there are slots free of unanswered requests.
    #[inline]
    fn accept(&mut self, prod: u32) -> Result<bool, RingFault> {
        let ahead = prod.wrapping_sub(self.req_cons);
        let most = self.ring.layout().slots().saturating_sub(self.unanswered());
        if ahead > most {
            return Err(RingFault::ProducerOverflow { prod, ahead, most });
        }
        self.req_seen = prod;
        Ok(ahead != 0)
    }
}
