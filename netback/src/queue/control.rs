//! The control ring. It is served with the first queue, by whoever serves that.

use super::hash::{HASH_MAPPING_MAX, HashConfig};
use super::notes::Notes;
use super::siblings::{ORDERS, Order, Outcome, Siblings};
use super::staged::STAGED_MAX;
use crate::fault::Fault;
use crate::port::PacketBuf;
use crate::stats::Stats;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_event_channel::{EventChannel, EventError};
use pvio_grant_table::{CopyBuf, CopyOp, DomId, GrantCopier, GrantRef, GrantStatus};
use pvio_ring::proto::netif::{
    CTRL_SLOT_SIZE, CtrlAsk, CtrlRequest, CtrlResponse, CtrlStatus, GREF_ENTRIES_MAX,
    GREF_ENTRY_SIZE, GrefEntry, GrefList, HASH_KEY_MAX,
};
use pvio_ring::shm::{PAGE_SIZE, SharedMemory};
use pvio_ring::{BackRing, RingFault};

/// Requests served between two looks at everything else.
const AT_ONCE: usize = 16;

/// The control ring and what was set up over it.
pub(super) struct Control<M, C> {
    ring: BackRing<M>,
    channel: C,
    hash: HashConfig,
    /// What stands in a page of the guest's: keys, mappings, lists.
    page: Box<[u8]>,
    /// Requests that a queue is at work on.
    ordered: usize,
    /// Whether guests may have pages kept mapped.
    stages: bool,
    notes: Option<Arc<Notes>>,
}

/// What comes of a request: an answer, or an order to a queue whose outcome is the answer.
enum Done {
    Now(CtrlStatus, u32),
    Later,
}

impl From<CtrlStatus> for Done {
    fn from(status: CtrlStatus) -> Self {
        Self::Now(status, 0)
    }
}

/// What a request needs besides the ring.
pub(super) struct Around<'a, G, B> {
    pub copier: &'a G,
    pub peer: DomId,
    pub siblings: &'a Siblings<B>,
    pub stats: &'a Stats,
}

impl<M: SharedMemory, C: EventChannel> Control<M, C> {
    pub fn attach(mem: M, channel: C, queues: usize, stages: bool) -> Result<Self, RingFault> {
        let ring = BackRing::attach(mem, CTRL_SLOT_SIZE)?;
        let page = alloc::vec![0; PAGE_SIZE].into_boxed_slice();
        let hash = HashConfig::new(queues);
        Ok(Self { ring, channel, hash, page, ordered: 0, stages, notes: None })
    }

    /// What was set up before, by another process's word.
    pub fn restore<B: PacketBuf>(&mut self, hash: HashConfig, siblings: &Siblings<B>) {
        self.hash = hash;
        siblings.set_hash(&self.hash);
    }

    /// Notes what the guest sets up from now on.
    pub fn keep(&mut self, notes: &Arc<Notes>) {
        self.notes = Some(Arc::clone(notes));
    }

    pub const fn channel(&self) -> &C {
        &self.channel
    }

    /// Serves some of the requests that wait.
    pub fn step<B: PacketBuf>(
        &mut self,
        around: &Around<'_, impl GrantCopier, B>,
    ) -> Result<(), Fault> {
        for _ in 0..AT_ONCE {
            if self.ordered >= ORDERS {
                break;
            }
            let Some(mut slot) = self.ring.pop().map_err(Fault::CtrlRing)? else { break };
            // A slot of the ring's size is never short.
            let request = CtrlRequest::read(&mut slot).unwrap_or_default();
            match self.serve(request, around) {
                Done::Now(status, data) => self.answer(request, status, data, around.stats),
                Done::Later => self.ordered = self.ordered.saturating_add(1),
            }
        }
        Ok(())
    }

    /// Answers a request that a queue has carried out.
    pub fn finish<B>(&mut self, outcome: Outcome, around: &Around<'_, impl GrantCopier, B>) {
        let Outcome { order, mut status, data } = outcome;
        self.ordered = self.ordered.saturating_sub(1);
        if !order.adds {
            let bytes = order.list.iter().flat_map(|entry| entry.to_bytes());
            let filled = self.page.iter_mut().zip(bytes).map(|(place, byte)| *place = byte).count();
            let part = self.page.get(..filled).unwrap_or_default();
            let with = CopyBuf::ToGrant(part);
            if filled > 0 && copy(around, order.page, with) != GrantStatus::Okay {
                status = CtrlStatus::InvalidParameter;
            }
        }
        self.answer(order.request, status, data, around.stats);
    }

    /// Shows the guest what was answered, and wakes it if it asked for that.
    pub fn publish(&mut self) -> Result<(), EventError> {
        if self.ring.publish() { self.channel.notify() } else { Ok(()) }
    }

    /// Whether the worker may sleep as far as this ring is concerned.
    pub fn may_sleep(&mut self) -> Result<bool, Fault> {
        // The outcome of an order wakes.
        Ok(self.ordered >= ORDERS || !self.ring.final_check().map_err(Fault::CtrlRing)?)
    }

    pub fn has_work(&mut self) -> Result<bool, Fault> {
        Ok(self.ordered < ORDERS && self.ring.has_requests().map_err(Fault::CtrlRing)?)
    }

    fn serve<B: PacketBuf>(
        &mut self,
        request: CtrlRequest,
        around: &Around<'_, impl GrantCopier, B>,
    ) -> Done {
        let Some(ask) = request.ask() else { return CtrlStatus::NotSupported.into() };
        let status = match ask {
            CtrlAsk::GetHashFlags => {
                return match self.hash.types_there_are() {
                    Ok(types) => Done::Now(CtrlStatus::Success, types),
                    Err(status) => status.into(),
                };
            }
            CtrlAsk::GetHashMappingSize => {
                return Done::Now(CtrlStatus::Success, HASH_MAPPING_MAX as u32);
            }
            CtrlAsk::SetHashAlgorithm(algorithm) => self.hash.set_algorithm(algorithm),
            CtrlAsk::SetHashFlags(types) => self.hash.set_types(types),
            CtrlAsk::SetHashKey { page, len } => self.set_key(page, len, around),
            CtrlAsk::SetHashMappingSize(size) => self.hash.set_mapping_size(size),
            CtrlAsk::SetHashMapping { page, len, offset } => {
                self.set_mapping(page, len, offset, around)
            }
            CtrlAsk::GetGrefMappingSize { .. }
            | CtrlAsk::AddGrefMapping(_)
            | CtrlAsk::DelGrefMapping(_)
                if !self.stages =>
            {
                return CtrlStatus::NotSupported.into();
            }
            CtrlAsk::GetGrefMappingSize { queue } => {
                if queue as usize >= around.siblings.len() {
                    return CtrlStatus::InvalidParameter.into();
                }
                return Done::Now(CtrlStatus::Success, STAGED_MAX as u32);
            }
            CtrlAsk::AddGrefMapping(list) => return self.order(request, list, true, around),
            CtrlAsk::DelGrefMapping(list) => return self.order(request, list, false, around),
        };
        if status == CtrlStatus::Success {
            around.siblings.set_hash(&self.hash);
            if let Some(notes) = &self.notes {
                notes.set_hash(&self.hash);
            }
        }
        status.into()
    }

    fn set_key<B>(
        &mut self,
        page: GrantRef,
        len: u32,
        around: &Around<'_, impl GrantCopier, B>,
    ) -> CtrlStatus {
        if len as usize > HASH_KEY_MAX {
            return CtrlStatus::BufferOverflow;
        }
        match self.read(page, len as usize, around) {
            Some(key) => {
                let mut copy = [0; HASH_KEY_MAX];
                copy.iter_mut().zip(key).for_each(|(to, from)| *to = *from);
                self.hash.set_key(copy.get(..len as usize).unwrap_or_default())
            }
            None => CtrlStatus::InvalidParameter,
        }
    }

    fn set_mapping<B>(
        &mut self,
        page: GrantRef,
        len: u32,
        offset: u32,
        around: &Around<'_, impl GrantCopier, B>,
    ) -> CtrlStatus {
        // Before anything is computed with them: XSA-270.
        if !self.hash.holds(offset, len) {
            return CtrlStatus::InvalidParameter;
        }
        let Some(raw) = self.read(page, (len as usize).saturating_mul(4), around) else {
            return CtrlStatus::InvalidParameter;
        };
        let mut part = [0; HASH_MAPPING_MAX];
        let (words, _) = raw.as_chunks();
        part.iter_mut().zip(words).for_each(|(to, word)| *to = u32::from_le_bytes(*word));
        self.hash.set_mapping(offset, part.get(..len as usize).unwrap_or_default())
    }

    fn order<B: PacketBuf>(
        &mut self,
        request: CtrlRequest,
        list: GrefList,
        adds: bool,
        around: &Around<'_, impl GrantCopier, B>,
    ) -> Done {
        let len = list.len as usize;
        if list.queue as usize >= around.siblings.len() || len > GREF_ENTRIES_MAX {
            return CtrlStatus::InvalidParameter.into();
        }
        let bytes = len.saturating_mul(GREF_ENTRY_SIZE);
        let Some(raw) = self.read(list.page, bytes, around) else {
            return CtrlStatus::InvalidParameter.into();
        };
        let (entries, _) = raw.as_chunks();
        let entries: Vec<_> = entries.iter().copied().map(GrefEntry::from_bytes).collect();
        let order = Order { request, page: list.page, list: entries, adds };
        if around.siblings.order(list.queue as usize, order) {
            Done::Later
        } else {
            CtrlStatus::InvalidParameter.into()
        }
    }

    /// The first bytes of a page of the guest's, read once.
    fn read<B>(
        &mut self,
        page: GrantRef,
        len: usize,
        around: &Around<'_, impl GrantCopier, B>,
    ) -> Option<&[u8]> {
        let place = self.page.get_mut(..len)?;
        if len > 0 && copy(around, page, CopyBuf::FromGrant(place)) != GrantStatus::Okay {
            return None;
        }
        self.page.get(..len)
    }

    fn answer(&mut self, request: CtrlRequest, status: CtrlStatus, data: u32, stats: &Stats) {
        stats.count_control(status);
        let CtrlRequest { id, kind, .. } = request;
        let response = CtrlResponse { id, kind, status: status as u32, data };
        // One answer for each request that was taken, so there is room.
        let pushed = self.ring.push(&response.to_bytes());
        debug_assert!(pushed.is_ok(), "more answers than requests");
    }
}

fn copy<B>(
    around: &Around<'_, impl GrantCopier, B>,
    gref: GrantRef,
    with: CopyBuf<'_>,
) -> GrantStatus {
    let (domain, status) = (around.peer, GrantStatus::GeneralError);
    let mut op = [CopyOp { domain, gref, offset: 0, with, status }];
    around.copier.copy(&mut op);
    let [CopyOp { status, .. }] = op;
    status
}
