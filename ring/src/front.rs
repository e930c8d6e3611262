//! The frontend side of a ring: it produces requests and consumes responses.

use crate::directions::{Requests, Responses};
use crate::indices;
use crate::indices::IndexMemory;
use crate::layout::{Full, RingFault, RingLayout};
use crate::shm::slot::{ShortSlot, Slot, SlotMut};
use crate::shm::{IndexWord, RingMemory, SharedMemory};
use core::sync::atomic::Ordering;

/// The frontend side of a shared ring (`FRONT_RING` in `ring.h`). Indices are free-running and wrap
/// at 2³². Nothing is visible to the backend until [`publish`](Self::publish).
#[derive(Debug)]
pub struct FrontRing<M> {
    ring: RingMemory<M>,
    /// Number of requests written, published or not.
    req_prod: u32,
    /// Number of requests that are published.
    req_published: u32,
    /// Number of responses taken.
    rsp_cons: u32,
    /// The backend's response producer as last read; responses before it are taken without reading
    /// shared memory.
    rsp_seen: u32,
}

impl<M: SharedMemory> FrontRing<M> {
    /// Initializes a ring in this domain's memory (`SHARED_RING_INIT`, then `FRONT_RING_INIT`),
    /// before the memory is granted. `slot_size` is the larger of request and response, in bytes.
    ///
    /// # Errors
    /// [`RingFault::Geometry`].
    pub fn init(mem: M, slot_size: usize) -> Result<Self, RingFault> {
        Self::init_at(mem, slot_size, 0)
    }

    /// Initializes a ring as [`init`](Self::init) does, with both directions starting at index
    /// `start`, as if that many requests had been completed. For a ring that is taken over, and for
    /// tests of the index wrap.
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

    /// Returns the number of requests that can be pushed before a response is taken.
    #[inline]
    #[must_use]
    pub fn free(&self) -> u32 {
        self.ring.layout().slots().saturating_sub(self.req_prod.wrapping_sub(self.rsp_cons))
    }

    /// Returns the number of requests pushed whose responses were not taken.
    #[inline]
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.req_prod.wrapping_sub(self.rsp_cons)
    }

    /// Returns the index of the next request pushed.
    #[must_use]
    pub fn next_index(&self) -> u32 {
        self.req_prod
    }

    /// Writes one request of at most a slot's size. It is not visible before
    /// [`publish`](Self::publish). The rest of the slot keeps its bytes, which were already visible
    /// to the peer.
    ///
    /// # Errors
    /// [`Full`] if every slot is in flight, or if the request is larger than a slot.
    #[inline]
    pub fn push(&mut self, request: &[u8]) -> Result<(), Full> {
        self.push_with(|slot| slot.write(request))
    }

    /// Pushes a request as [`push`](Self::push) does, but `write` writes it in place, which saves a
    /// copy.
    ///
    /// # Errors
    /// [`Full`] if every slot is in flight, or if `write` returns that the slot is too small; no
    /// request is pushed in that case.
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

    /// Publishes every pushed request, and returns whether the backend must be notified
    /// (`RING_PUSH_REQUESTS_AND_CHECK_NOTIFY`). To be called once per batch; does nothing if
    /// nothing is new.
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
    /// [`RingFault::ProducerOverflow`] if the backend's producer index claims responses to requests
    /// that were not published.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<Slot<'_, M>>, RingFault> {
        if self.rsp_cons == self.rsp_seen && !self.refresh()? {
            return Ok(None);
        }
        let at = self.rsp_cons;
        self.rsp_cons = self.rsp_cons.wrapping_add(1);
        Ok(Some(Slot::new(self.ring.slot(at))))
    }

    /// Returns the number of available responses, as of the last read of the producer index.
    #[inline]
    #[must_use]
    pub fn waiting(&self) -> u32 {
        self.rsp_seen.wrapping_sub(self.rsp_cons)
    }

    /// Reads the producer index from shared memory, and returns the number of available responses.
    /// Both sides write the cache line of the indices. So reading it once and taking all available
    /// responses is cheaper than taking responses until there is none.
    ///
    /// # Errors
    /// As [`pop`](Self::pop).
    #[inline]
    pub fn look(&mut self) -> Result<u32, RingFault> {
        self.refresh()?;
        Ok(self.waiting())
    }

    /// Returns whether a response is available. Reads shared memory only if no response is left of
    /// those last seen.
    ///
    /// # Errors
    /// As [`pop`](Self::pop).
    #[inline]
    pub fn has_responses(&mut self) -> Result<bool, RingFault> {
        Ok(self.rsp_cons != self.rsp_seen || self.refresh()?)
    }

    /// Arms a notification for the next response and checks again for responses
    /// (`RING_FINAL_CHECK_FOR_RESPONSES`). To be called before waiting for an event; wait only if
    /// it returns `false`.
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

    /// Returns the ring's geometry.
    #[must_use]
    pub fn layout(&self) -> RingLayout {
        self.ring.layout()
    }

    /// Returns the shared memory.
    #[must_use]
    pub fn memory(&self) -> &M {
        self.ring.memory()
    }

    #[inline]
    fn refresh(&mut self) -> Result<bool, RingFault> {
        let prod = Responses(&self.ring).load_prod();
        self.accept(prod)
    }

    /// Accepts a response producer only if it is not ahead of the published requests.
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
