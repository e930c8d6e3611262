//! Pages, grants, mappings and copies.

use super::{LocalDomain, State, lock};
use pvio_grant_table::v1::GrantTable;
use pvio_grant_table::{
    Access, Busy, CopyBuf, CopyOp, DomId, GrantCopier, GrantError, GrantMapper, GrantRef,
    GrantStatus, Granter,
};
use pvio_ring::shm::{Guarded, HeapMemory, PAGE_SIZE, Part, Region, SharedMemory};
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

/// Pages of the grant table, each with 512 entries (Xen's default `max_grant_frames`).
const TABLE_PAGES: usize = 64;
/// Largest number of pages that a domain can allocate: 256 MiB.
const MEMORY_PAGES: usize = 65536;

/// Pages of this domain; freed when the last clone and the last mapping are dropped.
pub type LocalPages = Guarded<HeapMemory, Arc<Owned>>;
/// Mapped pages of another domain; dropping it unmaps them.
pub type LocalMapping = Guarded<Part<HeapMemory>, InUse>;

/// Memory of a domain, from the hypervisor's view.
pub(super) struct Memory {
    table: GrantTable<HeapMemory>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// Page of each frame number; `None` if free.
    frames: Vec<Option<Frame>>,
    free_frames: Vec<u32>,
    /// Number of active grants. Other references below `next_gref` are free.
    granted: usize,
    free_grefs: Vec<GrantRef>,
    next_gref: u32,
    /// User of each mapped entry, and its number of uses.
    uses: HashMap<GrantRef, Uses>,
}

#[derive(Clone)]
struct Frame {
    memory: HeapMemory,
    page: usize,
}

/// An entry names one domain, so it has at most one user. The domain itself is stored, not its id,
/// which may be reused.
struct Uses {
    user: Arc<State>,
    count: u64,
}

impl Granter for LocalDomain {
    type Pages = LocalPages;

    fn alloc_pages(&self, count: usize) -> Result<LocalPages, GrantError> {
        let frames = lock(&self.state.memory.inner).take_frames(count)?;
        let memory = HeapMemory::pages(count);
        let mut inner = lock(&self.state.memory.inner);
        for (page, &frame) in frames.iter().enumerate() {
            inner.frames[frame as usize] = Some(Frame { memory: memory.clone(), page });
        }
        let owner = Arc::clone(&self.state);
        Ok(Guarded::new(memory, Arc::new(Owned { owner, frames })))
    }

    fn grant(
        &self,
        peer: DomId,
        pages: &LocalPages,
        page: usize,
        access: Access,
    ) -> Result<GrantRef, GrantError> {
        let owned = pages.guard();
        if !self.is_alive() {
            return Err(GrantError::Refused(GrantStatus::BadDomain));
        }
        if !Arc::ptr_eq(&owned.owner, &self.state) {
            return Err(GrantError::NotOurs);
        }
        let frame = *owned.frames.get(page).ok_or(GrantError::NotOurs)?;
        let memory = &self.state.memory;
        let gref = lock(&memory.inner).take_gref(memory.table.entries())?;
        memory.table.grant(gref, peer, frame, access)?;
        Ok(gref)
    }

    fn end_access(&self, gref: GrantRef) -> Result<(), Busy> {
        // The pages of a dead domain belong to the hypervisor, and no code of the domain runs. What is
        // left of it here must not keep them for ever.
        if !self.is_alive() {
            return Ok(());
        }
        let memory = &self.state.memory;
        let mut inner = lock(&memory.inner);
        // Ending an inactive grant does nothing; the reference must not be freed twice.
        if memory.table.entry(gref).is_none_or(|(flags, _)| flags.is_empty()) {
            return Ok(());
        }
        memory.table.end_access(gref)?;
        inner.granted -= 1;
        inner.free_grefs.push(gref);
        Ok(())
    }
}

impl GrantMapper for LocalDomain {
    type Mapping = LocalMapping;

    /// # Errors
    /// [`GrantStatus::NoSpace`] if the pages are not contiguous in their owner's memory: without
    /// page tables, they cannot be mapped contiguously.
    fn map(
        &self,
        domain: DomId,
        grefs: &[GrantRef],
        access: Access,
    ) -> Result<LocalMapping, GrantStatus> {
        if !self.is_alive() {
            return Err(GrantStatus::GeneralError);
        }
        let owner = self.machine.find(domain).ok_or(GrantStatus::BadDomain)?;
        // Dropping it early undoes the completed steps.
        let mut held = InUse { owner, user: Arc::clone(&self.state), grefs: Vec::new() };
        let mut frames = Vec::with_capacity(grefs.len());
        for &gref in grefs {
            frames.push(held.owner.memory.pin(gref, &self.state, access)?);
            held.grefs.push(gref);
            self.state.mapped.fetch_add(1, Ordering::SeqCst);
        }
        let first = frames.first().ok_or(GrantStatus::BadGrantRef)?;
        let in_line = |(i, f): (usize, &Frame)| {
            f.memory.base() == first.memory.base() && f.page == first.page + i
        };
        if !frames.iter().enumerate().all(in_line) {
            return Err(GrantStatus::NoSpace);
        }
        let at = first.page * PAGE_SIZE;
        let part = Part::new(first.memory.clone(), at, frames.len() * PAGE_SIZE);
        let part = part.ok_or(GrantStatus::BadPage)?;
        Ok(match access {
            Access::ReadOnly => Guarded::read_only(part, held),
            Access::ReadWrite => Guarded::new(part, held),
        })
    }
}

impl GrantCopier for LocalDomain {
    fn copy(&self, ops: &mut [CopyOp<'_>]) {
        // Consecutive operations often have the same domain, which is looked up once.
        let mut owner: Option<Arc<State>> = None;
        for op in ops {
            if owner.as_ref().is_none_or(|o| o.id != op.domain) {
                owner = self.machine.find(op.domain);
            }
            op.status = match &owner {
                Some(_) if !self.is_alive() => GrantStatus::GeneralError,
                Some(owner) => owner.memory.copy(op, self.state.id),
                None => GrantStatus::BadDomain,
            };
        }
    }
}

impl Memory {
    pub(super) fn allocated(&self) -> usize {
        lock(&self.inner).frames.iter().filter(|f| f.is_some()).count()
    }

    pub(super) fn granted(&self) -> usize {
        lock(&self.inner).granted
    }

    pub(super) fn forget_user(&self, user: &Arc<State>) {
        let mut inner = lock(&self.inner);
        // Only entries with a use are in use: copies are over.
        inner.uses.retain(|gref, uses| {
            let other = !Arc::ptr_eq(&uses.user, user);
            if !other {
                self.table.unpin(*gref, Access::ReadWrite);
            }
            other
        });
    }

    fn pin(&self, gref: GrantRef, user: &Arc<State>, access: Access) -> Result<Frame, GrantStatus> {
        let mut inner = lock(&self.inner);
        let frame = self.table.pin(gref, user.id, access)?;
        let first = || Uses { user: Arc::clone(user), count: 0 };
        inner.uses.entry(gref).or_insert_with(first).count += 1;
        match inner.frame(frame) {
            Some(frame) => Ok(frame),
            None => {
                // The entry names a frame that the domain does not have.
                self.unpin_locked(&mut inner, gref, user);
                Err(GrantStatus::BadPage)
            }
        }
    }

    fn unpin(&self, gref: GrantRef, user: &Arc<State>) -> bool {
        self.unpin_locked(&mut lock(&self.inner), gref, user)
    }

    /// Decrements the number of uses and, if it was the last one, clears the entry's marks. Returns
    /// whether there was a use: those of a killed domain were removed already.
    fn unpin_locked(&self, inner: &mut Inner, gref: GrantRef, user: &Arc<State>) -> bool {
        let uses = inner.uses.get_mut(&gref).filter(|uses| Arc::ptr_eq(&uses.user, user));
        let Some(uses) = uses else { return false };
        uses.count -= 1;
        if uses.count == 0 {
            inner.uses.remove(&gref);
            self.table.unpin(gref, Access::ReadWrite);
        }
        true
    }

    fn copy(&self, op: &mut CopyOp<'_>, user: DomId) -> GrantStatus {
        let (len, access) = match &op.with {
            CopyBuf::FromGrant(out) => (out.len(), Access::ReadOnly),
            CopyBuf::ToGrant(from) => (from.len(), Access::ReadWrite),
        };
        if op.offset.checked_add(len).is_none_or(|end| end > PAGE_SIZE) {
            return GrantStatus::BadCopyArgument;
        }
        let inner = lock(&self.inner);
        let frame = match self.table.pin(op.gref, user, access) {
            Ok(frame) => frame,
            Err(status) => return status,
        };
        let done = inner.frame(frame).and_then(|frame| {
            let at = frame.page * PAGE_SIZE + op.offset;
            match &mut op.with {
                CopyBuf::FromGrant(out) => frame.memory.read_bytes(at, out),
                CopyBuf::ToGrant(from) => frame.memory.write_bytes(at, from),
            }
        });
        // A mapping of the same page keeps the marks.
        if !inner.uses.contains_key(&op.gref) {
            self.table.unpin(op.gref, access);
        }
        if done.is_some() { GrantStatus::Okay } else { GrantStatus::BadPage }
    }
}

impl Default for Memory {
    fn default() -> Self {
        let inner = Inner { next_gref: GrantRef::FIRST_FREE.0, ..Inner::default() };
        let table = GrantTable::new(HeapMemory::pages(TABLE_PAGES));
        Self { table, inner: Mutex::new(inner) }
    }
}

impl Inner {
    fn frame(&self, frame: u32) -> Option<Frame> {
        self.frames.get(frame as usize)?.clone()
    }

    fn take_frames(&mut self, count: usize) -> Result<Vec<u32>, GrantError> {
        let fresh = count.saturating_sub(self.free_frames.len());
        if count == 0 || fresh > MEMORY_PAGES - self.frames.len() {
            return Err(GrantError::OutOfPages);
        }
        let first = self.frames.len();
        self.frames.resize(first + fresh, None);
        let reused = self.free_frames.split_off(self.free_frames.len() - (count - fresh));
        Ok(reused.into_iter().chain((first..first + fresh).map(|f| f as u32)).collect())
    }

    fn take_gref(&mut self, entries: u32) -> Result<GrantRef, GrantError> {
        let gref = match self.free_grefs.pop() {
            Some(gref) => gref,
            None if self.next_gref < entries => {
                self.next_gref += 1;
                GrantRef(self.next_gref - 1)
            }
            None => return Err(GrantError::OutOfEntries),
        };
        self.granted += 1;
        Ok(gref)
    }
}

/// Keeps frame numbers allocated.
pub struct Owned {
    owner: Arc<State>,
    frames: Vec<u32>,
}

impl Drop for Owned {
    fn drop(&mut self) {
        let mut inner = lock(&self.owner.memory.inner);
        for &frame in &self.frames {
            inner.frames[frame as usize] = None;
        }
        inner.free_frames.extend(&self.frames);
    }
}

/// Keeps the in-use marks of mapped grants.
pub struct InUse {
    owner: Arc<State>,
    user: Arc<State>,
    grefs: Vec<GrantRef>,
}

impl Drop for InUse {
    fn drop(&mut self) {
        for &gref in &self.grefs {
            if self.owner.memory.unpin(gref, &self.user) {
                let _ = self
                    .user
                    .mapped
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
            }
        }
    }
}

impl fmt::Debug for Owned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "frames {:?} of domain {}", self.frames, self.owner.id)
    }
}

impl fmt::Debug for InUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "grants {:?} of domain {}", self.grefs, self.owner.id)
    }
}
