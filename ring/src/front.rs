//! The frontend's end of a ring: it produces requests and consumes responses.

use crate::directions::{Requests, Responses};
use crate::indices;
use crate::indices::IndexMemory;
use crate::layout::{Full, RingFault, RingLayout};
use crate::shm::slot::{ShortSlot, Slot, SlotMut};
use crate::shm::{IndexWord, RingMemory, SharedMemory};
use core::sync::atomic::Ordering;

/// The frontend's end of a shared ring (`FRONT_RING` in `ring.h`). Indices run free and wrap at
/// 2³². Nothing is visible to the backend until [`publish`](Self::publish).
#[derive(Debug)]
pub struct FrontRing<M> {
    ring: RingMemory<M>,
    /// Requests written, published or not.
    req_prod: u32,
    /// Requests the backend can see.
    req_published: u32,
    /// Responses taken.
    rsp_cons: u32,
    /// The backend's response producer as last read; responses before it need no shared read.
    rsp_seen: u32,
}

impl<M: SharedMemory> FrontRing<M> {
    /// Makes a fresh ring in memory of our own (`SHARED_RING_INIT`, then `FRONT_RING_INIT`), to be
    /// done before the memory is granted. `slot_size` is the larger of request and response.
    ///
    /// # Errors
    /// [`RingFault::Geometry`].
    pub fn init(mem: M, slot_size: usize) -> Result<Self, RingFault> {
        Self::init_at(mem, slot_size, 0)
    }

    /// Like [`init`](Self::init), with both directions starting at index `start` as if that many
    /// requests had been answered before: for a ring taken over from somebody else, and for tests
    /// across the wrap.
    ///
    /// # Errors
    /// [`RingFault::Geometry`].
    pub fn init_at(mem: M, slot_size: usize, start: u32) -> Result<Self, RingFault> {
        let ring = RingMemory::new(mem, slot_size)?;
        for (at, value) in [
            (IndexWord::ReqProd, start),
            (IndexWord::RspProd, start),
            (IndexWord::ReqEvent, start.wrapping_add(1)),
            (IndexWord::RspEvent, start.wrapping_add(1)),
        ] {
            ring.store_index(at, value, Ordering::Release);
        }
        Ok(Self { ring, req_prod: start, req_published: start, rsp_cons: start, rsp_seen: start })
    }

    /// How many requests can be pushed before a response is taken.
    #[inline]
    #[must_use]
    pub fn free(&self) -> u32 {
        self.ring.layout().slots().saturating_sub(self.req_prod.wrapping_sub(self.rsp_cons))
    }

    /// Requests pushed whose responses were not taken yet.
    #[inline]
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.req_prod.wrapping_sub(self.rsp_cons)
    }

    /// The index the next pushed request will have.
    #[must_use]
    pub fn next_index(&self) -> u32 {
        self.req_prod
    }

    /// Writes one request (at most a slot's size; what is left of the slot keeps old bytes, which
    /// were ours or the peer's already). Not visible before [`publish`](Self::publish).
    ///
    /// # Errors
    /// [`Full`] when every slot is in flight, or the request is larger than a slot.
    #[inline]
    pub fn push(&mut self, request: &[u8]) -> Result<(), Full> {
        self.push_with(|slot| slot.write(request))
    }

    /// Like [`push`](Self::push), but has the request written in place, which spares a copy.
    ///
    /// # Errors
    /// [`Full`] when every slot is in flight, or `write` says that a slot is too small; no request
    /// is pushed then.
    #[inline]
    pub fn push_with(
        &mut self,
        write: impl FnOnce(&mut SlotMut<'_, M>) -> Result<(), ShortSlot>,
    ) -> Result<(), Full> {
        if self.free() == 0 {
            return Err(Full);
        }
        write(&mut SlotMut::new(self.ring.slot_mut(self.req_prod))).map_err(|ShortSlot| Full)?;
        self.req_prod = self.req_prod.wrapping_add(1);
        Ok(())
    }

    /// Shows every pushed request to the backend, and tells whether it must be notified
    /// (`RING_PUSH_REQUESTS_AND_CHECK_NOTIFY`). Call once a batch; does nothing if nothing is new.
    #[inline]
    #[must_use = "a backend that asked to be notified sleeps until it is"]
    pub fn publish(&mut self) -> bool {
        if self.req_published == self.req_prod {
            return false;
        }
        let old = core::mem::replace(&mut self.req_published, self.req_prod);
        indices::publish(&Requests(&self.ring), old, self.req_prod)
    }

    /// Takes the next response, if there is one.
    ///
    /// # Errors
    /// [`RingFault::ProducerOverflow`] when the backend claims responses to requests it was never
    /// sent.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<Slot<'_, M>>, RingFault> {
        if self.rsp_cons == self.rsp_seen && !self.refresh()? {
            return Ok(None);
        }
        let at = self.rsp_cons;
        self.rsp_cons = self.rsp_cons.wrapping_add(1);
        Ok(Some(Slot::new(self.ring.slot(at))))
    }

    /// Responses waiting as far as the last look at shared memory showed.
    #[inline]
    #[must_use]
    pub fn waiting(&self) -> u32 {
        self.rsp_seen.wrapping_sub(self.rsp_cons)
    }

    /// Looks at shared memory for responses newer than the last look, and returns how many wait.
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

    /// Whether a response is waiting. Reads shared memory only when the last look is used up.
    ///
    /// # Errors
    /// As [`pop`](Self::pop).
    #[inline]
    pub fn has_responses(&mut self) -> Result<bool, RingFault> {
        Ok(self.rsp_cons != self.rsp_seen || self.refresh()?)
    }

    /// To be called before waiting for an event: asks to be notified of the next response and
    /// looks once more (`RING_FINAL_CHECK_FOR_RESPONSES`). Wait only if it says `false`.
    ///
    /// # Errors
    /// As [`pop`](Self::pop).
    #[inline]
    pub fn final_check(&mut self) -> Result<bool, RingFault> {
        if self.rsp_cons != self.rsp_seen {
            return Ok(true);
        }
        let prod = indices::ask_for_event(&Responses(&self.ring), self.rsp_cons);
        self.accept(prod)
    }

    /// The ring's geometry.
    #[must_use]
    pub fn layout(&self) -> RingLayout {
        self.ring.layout()
    }

    /// The shared memory.
    #[must_use]
    pub fn memory(&self) -> &M {
        self.ring.memory()
    }

    #[inline]
    fn refresh(&mut self) -> Result<bool, RingFault> {
        let prod = Responses(&self.ring).load_prod();
        self.accept(prod)
    }

    /// Believes a response producer only as far as there are published requests to answer.
    #[inline]
    fn accept(&mut self, prod: u32) -> Result<bool, RingFault> {
        let ahead = prod.wrapping_sub(self.rsp_cons);
        let most = self.req_published.wrapping_sub(self.rsp_cons);
        if ahead > most {
            return Err(RingFault::ProducerOverflow { prod, ahead, most });
        }
        self.rsp_seen = prod;
        Ok(ahead != 0)
    }
}
