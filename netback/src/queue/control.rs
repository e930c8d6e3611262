//! The control ring. It is served by the first queue, on that queue's thread.

use super::hash::HASH_MAPPING_MAX;
use super::queue_set::{QueueSet, StagingCommand, StagingResult};
use super::setup::{Setup, SetupLog};
use super::staged::STAGED_MAX;
use crate::fault::{AttachError, Fault};
use crate::port::PacketBuf;
use crate::stats::Stats;
use alloc::boxed::Box;
use alloc::vec::Vec;
use pvio_event_channel::{EventChannel, EventError};
use pvio_grant_table::{CopyBuf, CopyOp, DomId, GrantCopier, GrantRef, GrantStatus};
use pvio_ring::BackRing;
use pvio_ring::inflight::RecordError;
use pvio_ring::proto::netif::{
    CTRL_SLOT_SIZE, CtrlAsk, CtrlRequest, CtrlResponse, CtrlStatus, GREF_ENTRIES_MAX,
    GREF_ENTRY_SIZE, GrefEntry, GrefList, HASH_KEY_MAX,
};
use pvio_ring::shm::{PAGE_SIZE, SharedMemory};

/// Name of the ring in errors.
const RING: &str = "control";
/// Limit of requests served in one step, so that packets are not delayed.
const AT_ONCE: usize = 16;

/// Control ring and the configuration that the guest made with it. Requests are executed one at a time.
pub(super) struct Control<M, C, R> {
    ring: BackRing<M>,
    channel: C,
    setup: Setup,
    log: SetupLog<R>,
    /// Copy of the contents of a guest page: keys, mappings, lists.
    page: Box<[u8]>,
    /// Whether a queue is executing a request.
    outstanding: bool,
    /// Whether staging grants are supported for this guest.
    stages: bool,
    /// Whether the guest has to be notified of responses.
    notify: bool,
}

/// Result of a request: its response, or a command to a queue whose result becomes the response.
enum Done {
    Now(CtrlStatus, u32),
    Later,
}

impl From<CtrlStatus> for Done {
    fn from(status: CtrlStatus) -> Self {
        Self::Now(status, 0)
    }
}

/// Context of a request besides the ring.
pub(super) struct ControlContext<'a, G, B> {
    pub copier: &'a G,
    pub peer: DomId,
    pub set: &'a QueueSet<B>,
    pub stats: &'a Stats,
}

impl<M: SharedMemory, C: EventChannel, R: SharedMemory> Control<M, C, R> {
    /// Attaches to a control ring for `queues` queues. If the session is resumed, continues at the
    /// position in the in-flight record.
    pub fn attach(
        memory: M,
        channel: C,
        queues: usize,
        stages: bool,
        (section, resumed): (R, bool),
    ) -> Result<Self, AttachError> {
        let unusable = |fault| AttachError::Ring { ring: RING, fault };
        let inconsistent = |error| AttachError::Record { ring: RING, error };
        let mut ring = BackRing::attach(memory, CTRL_SLOT_SIZE).map_err(unusable)?;
        let mut log = SetupLog::new(section, queues).map_err(inconsistent)?;
        let produced = ring.produced();
        let (mut setup, mut notify) = (Setup::new(queues, produced.into()), false);
        if resumed {
            setup = log.read(queues).map_err(inconsistent)?;
            let served = setup.served as u32;
            match served.wrapping_sub(produced) {
                0 => {}
                // The previous process ended after it recorded the response and before it published it.
                1 => {
                    ring.resume(1).map_err(unusable)?;
                    notify = show(&mut ring, &setup.response);
                }
                _ => {
                    let answered = served.wrapping_sub(1);
                    let error = RecordError::Producer { produced, answered, done: 1 };
                    return Err(inconsistent(error));
                }
            }
        } else {
            log.commit(&setup);
        }
        let page = alloc::vec![0; PAGE_SIZE].into_boxed_slice();
        Ok(Self { ring, channel, setup, log, page, outstanding: false, stages, notify })
    }

    /// Returns the recorded configuration of a resumed session.
    pub const fn setup(&self) -> &Setup {
        &self.setup
    }

    pub const fn channel(&self) -> &C {
        &self.channel
    }

    /// Serves up to [`AT_ONCE`] outstanding requests.
    pub fn step<B: PacketBuf>(
        &mut self,
        context: &ControlContext<'_, impl GrantCopier, B>,
    ) -> Result<(), Fault> {
        for _ in 0..AT_ONCE {
            if self.outstanding {
                break;
            }
            let Some(mut slot) = self.ring.pop().map_err(Fault::CtrlRing)? else { break };
            // A slot has the ring's slot size, so reading it does not fail.
            let request = CtrlRequest::read(&mut slot).unwrap_or_default();
            match self.serve(request, context) {
                Done::Now(status, data) => self.answer(request, status, data, context.stats),
                Done::Later => self.outstanding = true,
            }
        }
        Ok(())
    }

    /// Responds to a request that a queue has executed.
    pub fn finish<B>(
        &mut self,
        result: StagingResult,
        context: &ControlContext<'_, impl GrantCopier, B>,
    ) {
        let StagingResult { command, mut status, data } = result;
        self.outstanding = false;
        self.note(&command, status);
        if !command.adds {
            let bytes = command.list.iter().flat_map(|entry| entry.to_bytes());
            let filled = self.page.iter_mut().zip(bytes).map(|(place, byte)| *place = byte).count();
            let part = self.page.get(..filled).unwrap_or_default();
            let with = CopyBuf::ToGrant(part);
            if filled > 0 && copy(context, command.page, with) != GrantStatus::Okay {
                status = CtrlStatus::InvalidParameter;
            }
        }
        self.answer(command.request, status, data, context.stats);
    }

    /// Notifies the guest if responses were published and the guest requested a notification.
    pub fn notify(&mut self) -> Result<(), EventError> {
        if core::mem::take(&mut self.notify) { self.channel.notify() } else { Ok(()) }
    }

    /// Updates the recorded configuration with the pages that a queue mapped or unmapped.
    fn note(&mut self, command: &StagingCommand, status: CtrlStatus) {
        let Some(staged) = self.setup.staged.get_mut(command.queue) else { return };
        for entry in &command.list {
            if command.adds && status == CtrlStatus::Success {
                staged.insert(entry.gref, entry.read_only);
            } else if !command.adds {
                staged.remove(&entry.gref);
            }
        }
    }

    /// Requests a notification and returns whether there is work.
    pub fn final_check(&mut self) -> Result<bool, Fault> {
        // The result of an outstanding command wakes the worker.
        Ok(!self.outstanding && self.ring.final_check().map_err(Fault::CtrlRing)?)
    }

    pub fn has_work(&mut self) -> Result<bool, Fault> {
        Ok(!self.outstanding && self.ring.has_requests().map_err(Fault::CtrlRing)?)
    }

    fn serve<B: PacketBuf>(
        &mut self,
        request: CtrlRequest,
        context: &ControlContext<'_, impl GrantCopier, B>,
    ) -> Done {
        let Some(operation) = request.ask() else { return CtrlStatus::NotSupported.into() };
        let status = match operation {
            CtrlAsk::GetHashFlags => {
                return match self.setup.hash.types_there_are() {
                    Ok(types) => Done::Now(CtrlStatus::Success, types),
                    Err(status) => status.into(),
                };
            }
            CtrlAsk::GetHashMappingSize => {
                return Done::Now(CtrlStatus::Success, HASH_MAPPING_MAX as u32);
            }
            CtrlAsk::SetHashAlgorithm(algorithm) => self.setup.hash.set_algorithm(algorithm),
            CtrlAsk::SetHashFlags(types) => self.setup.hash.set_types(types),
            CtrlAsk::SetHashKey { page, len } => self.set_key(page, len, context),
            CtrlAsk::SetHashMappingSize(size) => self.setup.hash.set_mapping_size(size),
            CtrlAsk::SetHashMapping { page, len, offset } => {
                self.set_mapping(page, len, offset, context)
            }
            CtrlAsk::GetGrefMappingSize { .. }
            | CtrlAsk::AddGrefMapping(_)
            | CtrlAsk::DelGrefMapping(_)
                if !self.stages =>
            {
                return CtrlStatus::NotSupported.into();
            }
            CtrlAsk::GetGrefMappingSize { queue } => {
                if queue as usize >= context.set.len() {
                    return CtrlStatus::InvalidParameter.into();
                }
                return Done::Now(CtrlStatus::Success, STAGED_MAX as u32);
            }
            CtrlAsk::AddGrefMapping(list) => return self.command(request, list, true, context),
            CtrlAsk::DelGrefMapping(list) => return self.command(request, list, false, context),
        };
        if status == CtrlStatus::Success {
            context.set.set_hash(&self.setup.hash);
        }
        status.into()
    }

    fn set_key<B>(
        &mut self,
        page: GrantRef,
        len: u32,
        context: &ControlContext<'_, impl GrantCopier, B>,
    ) -> CtrlStatus {
        if len as usize > HASH_KEY_MAX {
            return CtrlStatus::BufferOverflow;
        }
        match self.read(page, len as usize, context) {
            Some(key) => {
                let mut copy = [0; HASH_KEY_MAX];
                copy.iter_mut().zip(key).for_each(|(to, from)| *to = *from);
                self.setup.hash.set_key(copy.get(..len as usize).unwrap_or_default())
            }
            None => CtrlStatus::InvalidParameter,
        }
    }

    fn set_mapping<B>(
        &mut self,
        page: GrantRef,
        len: u32,
        offset: u32,
        context: &ControlContext<'_, impl GrantCopier, B>,
    ) -> CtrlStatus {
        // Checked before any arithmetic with the values: XSA-270.
        if !self.setup.hash.holds(offset, len) {
            return CtrlStatus::InvalidParameter;
        }
        let Some(raw) = self.read(page, (len as usize).saturating_mul(4), context) else {
            return CtrlStatus::InvalidParameter;
        };
        let mut part = [0; HASH_MAPPING_MAX];
        let (words, _) = raw.as_chunks();
        part.iter_mut().zip(words).for_each(|(to, word)| *to = u32::from_le_bytes(*word));
        self.setup.hash.set_mapping(offset, part.get(..len as usize).unwrap_or_default())
    }

    fn command<B: PacketBuf>(
        &mut self,
        request: CtrlRequest,
        list: GrefList,
        adds: bool,
        context: &ControlContext<'_, impl GrantCopier, B>,
    ) -> Done {
        let len = list.len as usize;
        if list.queue as usize >= context.set.len() || len > GREF_ENTRIES_MAX {
            return CtrlStatus::InvalidParameter.into();
        }
        let bytes = len.saturating_mul(GREF_ENTRY_SIZE);
        let Some(raw) = self.read(list.page, bytes, context) else {
            return CtrlStatus::InvalidParameter.into();
        };
        let (entries, _) = raw.as_chunks();
        let entries: Vec<_> = entries.iter().copied().map(GrefEntry::from_bytes).collect();
        let command = StagingCommand {
            request,
            queue: list.queue as usize,
            page: list.page,
            list: entries,
            adds,
        };
        if context.set.send(command) { Done::Later } else { CtrlStatus::InvalidParameter.into() }
    }

    /// Returns the first bytes of a guest page, read once.
    fn read<B>(
        &mut self,
        page: GrantRef,
        len: usize,
        context: &ControlContext<'_, impl GrantCopier, B>,
    ) -> Option<&[u8]> {
        let place = self.page.get_mut(..len)?;
        if len > 0 && copy(context, page, CopyBuf::FromGrant(place)) != GrantStatus::Okay {
            return None;
        }
        self.page.get(..len)
    }

    /// Records the configuration together with the response, then publishes the response.
    fn answer(&mut self, request: CtrlRequest, status: CtrlStatus, data: u32, stats: &Stats) {
        stats.count_control(status);
        let CtrlRequest { id, kind, .. } = request;
        let response = CtrlResponse { id, kind, status: status as u32, data };
        self.setup.served = self.setup.served.saturating_add(1);
        self.setup.response = response.to_bytes();
        self.log.commit(&self.setup);
        self.notify |= show(&mut self.ring, &self.setup.response);
    }
}

/// Publishes a response. Returns whether the guest has to be notified.
fn show<M: SharedMemory>(ring: &mut BackRing<M>, response: &[u8]) -> bool {
    // There is one response per request taken, so the ring has space.
    let pushed = ring.push(response);
    debug_assert!(pushed.is_ok(), "more responses than requests");
    ring.publish()
}

fn copy<B>(
    context: &ControlContext<'_, impl GrantCopier, B>,
    gref: GrantRef,
    with: CopyBuf<'_>,
) -> GrantStatus {
    let (domain, status) = (context.peer, GrantStatus::GeneralError);
    let mut op = [CopyOp { domain, gref, offset: 0, with, status }];
    context.copier.copy(&mut op);
    let [CopyOp { status, .. }] = op;
    status
}
