//! Requests in flight, whole or split, and their responses.

use super::{BackendFault, FlushBy, Op, Queue, SECTOR, Slot, SlotId, StartError};
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::Granter;
use pvio_ring::proto::blkif::{Abi, DataOp, MAX_SEGMENTS, Request, Response, Segments, Status};
use pvio_ring::shm::PAGE_SIZE;

/// A slot's request that is not completed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Flight {
    pub op: Op,
    /// Bytes requested from the backend so far; for an operation without data, 1 once it was sent.
    sent: usize,
    /// Requests in the ring.
    parts: u16,
    /// Status of the first response that was not `Okay`.
    status: Status,
}

impl Flight {
    pub const fn new(op: Op) -> Self {
        Self { op, sent: 0, parts: 0, status: Status::Okay }
    }

    const fn total(&self) -> usize {
        match self.op {
            Op::Read { bytes, .. } | Op::Write { bytes, .. } => bytes,
            Op::Flush | Op::Discard { .. } | Op::SecureDiscard { .. } => 1,
        }
    }

    /// Returns whether nothing is left to send: all parts were sent, or one failed.
    fn is_sent(&self) -> bool {
        self.sent >= self.total() || self.status != Status::Okay
    }
}

impl<P: Granter + EventChannels> Queue<P> {
    /// Writes a reserved slot's request into the ring. The backend sees it after
    /// [`publish`](Self::publish). A request that the backend does not support is not sent. The
    /// next [`poll`](Self::poll) completes it without an event: with [`Status::NotSupported`], or
    /// with [`Status::Error`] for changes of a read-only disk.
    ///
    /// # Errors
    /// [`StartError`]; the slot stays reserved.
    pub fn start(&mut self, id: SlotId, op: Op) -> Result<(), StartError> {
        if self.slots.get(id.index()) != Some(&Slot::Reserved) {
            return Err(StartError::NotReserved);
        }
        if let Op::Read { bytes, .. } | Op::Write { bytes, .. } = op
            && (bytes == 0 || bytes > self.slot_bytes() || !bytes.is_multiple_of(SECTOR))
        {
            return Err(StartError::Size);
        }
        self.limits().check(op)?;
        self.slots[id.index()] = Slot::InFlight(Flight::new(op));
        if self.backlog.is_empty() {
            self.send(id);
        } else {
            self.backlog.push_back(id);
        }
        Ok(())
    }

    /// Publishes all started requests and notifies the backend if it requested a notification.
    ///
    /// # Errors
    /// [`BackendFault::Event`].
    pub fn publish(&mut self) -> Result<(), BackendFault> {
        if self.ring.publish() {
            self.channel.notify()?;
        }
        Ok(())
    }

    /// Calls `each` for every completed request and returns their number. The slot is reserved for
    /// the caller again: it can be read, started again, or released. Also sends requests that
    /// waited for room in the ring.
    ///
    /// # Errors
    /// A [`BackendFault`] ends the device; requests completed before the fault were reported.
    pub fn poll(
        &mut self,
        mut each: impl FnMut(SlotId, Op, Status),
    ) -> Result<usize, BackendFault> {
        let mut count = 0;
        while let Some(mut slot) = self.ring.pop()? {
            let Response { id, status, .. } = Response::read(&mut slot)?;
            let place = usize::try_from(id).ok().and_then(|i| self.slots.get_mut(i));
            let Some(place @ &mut Slot::InFlight(mut flight)) = place else {
                return Err(BackendFault::UnknownId(id));
            };
            // A request of which no part is in the ring cannot have a response.
            let Some(left) = flight.parts.checked_sub(1) else {
                return Err(BackendFault::UnknownId(id));
            };
            flight.parts = left;
            if flight.status == Status::Okay {
                flight.status = status;
            }
            if (left > 0 || !flight.is_sent()) && !pvio_ring::planted!(SplitRequest) {
                *place = Slot::InFlight(flight);
                continue;
            }
            *place = Slot::Reserved;
            let id = SlotId(id as u16);
            if flight.sent < flight.total() {
                // After a failure, the remaining parts are not sent.
                self.backlog.retain(|waiting| *waiting != id);
            }
            each(id, flight.op, flight.status);
            count += 1;
        }
        if !self.backlog.is_empty() {
            self.send_backlog()?;
        }
        while let Some((id, status)) = self.local.pop_front() {
            if let Some(place @ &mut Slot::InFlight(flight)) = self.slots.get_mut(id.index()) {
                *place = Slot::Reserved;
                each(id, flight.op, status);
                count += 1;
            }
        }
        Ok(count)
    }

    /// Returns whether a response is available. Reads shared memory only; does not arm a
    /// notification.
    ///
    /// # Errors
    /// [`BackendFault::Ring`].
    pub fn has_answers(&mut self) -> Result<bool, BackendFault> {
        Ok(!self.local.is_empty() || self.ring.has_responses()?)
    }

    /// Arms a notification for the next response and checks again for responses. To be called
    /// before waiting for an event; wait only if it returns `false`.
    ///
    /// # Errors
    /// [`BackendFault::Ring`].
    pub fn final_check(&mut self) -> Result<bool, BackendFault> {
        Ok(self.ring.final_check()? || !self.local.is_empty())
    }

    /// Sends a slot's request as far as the ring has room; the rest stays in the backlog.
    pub(super) fn send(&mut self, id: SlotId) {
        let Some(&Slot::InFlight(mut flight)) = self.slots.get(id.index()) else { return };
        // Parts that are in the ring are completed by the backend.
        if flight.sent == 0
            && let Some(status) = self.limits().answer(flight.op)
        {
            return self.local.push_back((id, status));
        }
        while !flight.is_sent() && self.ring.free() > 0 {
            let Some((request, sent)) = self.request(id, &flight) else {
                // Tables and buffers have room for every request that `start` accepts.
                debug_assert!(false, "a request that cannot be said");
                flight.status = Status::Error;
                break;
            };
            let mut bytes = [0; 112];
            let pushed = self.ring.push(request.write(Abi::X86_64, self.handle, &mut bytes));
            debug_assert!(pushed.is_ok(), "there is room in the ring");
            (flight.sent, flight.parts) = (sent, flight.parts + 1);
        }
        self.slots[id.index()] = Slot::InFlight(flight);
        if !flight.is_sent() {
            self.backlog.push_back(id);
        } else if flight.parts == 0 {
            self.local.push_back((id, flight.status));
        }
    }

    /// Sends requests that waited for room in the ring.
    #[cold]
    fn send_backlog(&mut self) -> Result<(), BackendFault> {
        while self.ring.free() > 0 {
            let Some(id) = self.backlog.pop_front() else { break };
            self.send(id);
        }
        self.publish()
    }

    /// Returns the next part of a slot's request, and the number of bytes it requests.
    fn request(&self, slot: SlotId, flight: &Flight) -> Option<(Request, usize)> {
        let id = u64::from(slot.0);
        let discard = |sector, sectors, secure| Request::Discard { id, sector, sectors, secure };
        let (op, sector, bytes) = match flight.op {
            Op::Read { sector, bytes } => (DataOp::Read, sector, bytes),
            Op::Write { sector, bytes } => (DataOp::Write, sector, bytes),
            Op::Discard { sector, sectors } => return Some((discard(sector, sectors, false), 1)),
            Op::SecureDiscard { sector, sectors } => {
                return Some((discard(sector, sectors, true), 1));
            }
            Op::Flush => {
                let barrier = self.limits.flush == FlushBy::Barrier;
                let op = if barrier { DataOp::WriteBarrier } else { DataOp::Flush };
                return Some((
                    Request::Data { op, id, sector: 0, segments: Segments::default() },
                    1,
                ));
            }
        };
        let from = flight.sent;
        let sector = sector.wrapping_add((from / SECTOR) as u64);
        let part = (bytes - from).min(self.limits.part());
        let request = if part <= MAX_SEGMENTS * PAGE_SIZE {
            let segments = self.memory.segments(slot.index(), from, part)?;
            Request::Data { op, id, sector, segments }
        } else {
            let indirect = self.memory.write_table(slot.index(), from, part)?;
            Request::Indirect { op, id, sector, indirect }
        };
        Some((request, from + part))
    }
}
