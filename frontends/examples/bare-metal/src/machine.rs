//! A minimal machine for two domains: one heap, grants as table entries, event channels as two
//! flags. A kernel or hypervisor has to provide no more than that.

use alloc::rc::Rc;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, Ordering};

use pvio_event_channel::{DomId, EventChannel, EventChannels, EventError, Port};
use pvio_grant_table::{
    Access, Busy, CopyBuf, CopyOp, GrantCopier, GrantError, GrantMapper, GrantRef, GrantStatus,
    Granter,
};
use pvio_ring::shm::{HeapMemory, PAGE_SIZE, Region, SharedMemory};

/// The machine, as both domains access it.
#[derive(Clone, Default)]
pub struct Machine(Rc<RefCell<State>>);

#[derive(Default)]
struct State {
    grants: Vec<Option<(HeapMemory, usize)>>,
    /// Index 0 is port 1.
    channels: Vec<[Arc<AtomicBool>; 2]>,
}

impl Granter for Machine {
    type Pages = HeapMemory;

    fn alloc_pages(&self, count: usize) -> Result<HeapMemory, GrantError> {
        Ok(HeapMemory::pages(count))
    }

    fn grant(
        &self,
        _peer: DomId,
        pages: &HeapMemory,
        page: usize,
        _access: Access,
    ) -> Result<GrantRef, GrantError> {
        let grants = &mut self.0.borrow_mut().grants;
        grants.push(Some((pages.clone(), page)));
        Ok(GrantRef(grants.len() as u32 - 1))
    }

    fn end_access(&self, gref: GrantRef) -> Result<(), Busy> {
        self.0.borrow_mut().grants[gref.0 as usize] = None;
        Ok(())
    }
}

/// One granted page.
pub struct Mapped {
    pages: HeapMemory,
    page: usize,
}

// SAFETY: a page inside memory that fulfils the same contract, and that this keeps alive.
unsafe impl SharedMemory for Mapped {
    fn base(&self) -> NonNull<u8> {
        // SAFETY: `map` checked that the page lies inside.
        unsafe { self.pages.base().add(self.page * PAGE_SIZE) }
    }

    fn len(&self) -> usize {
        PAGE_SIZE
    }
}

impl GrantMapper for Machine {
    type Mapping = Mapped;

    fn map(
        &self,
        _domain: DomId,
        grefs: &[GrantRef],
        _access: Access,
    ) -> Result<Mapped, GrantStatus> {
        let &[GrantRef(gref)] = grefs else { return Err(GrantStatus::NoSpace) };
        let state = self.0.borrow();
        let grant = state.grants.get(gref as usize).and_then(Option::as_ref);
        let (pages, page) = grant.ok_or(GrantStatus::BadGrantRef)?.clone();
        if page >= pages.len() / PAGE_SIZE {
            return Err(GrantStatus::BadPage);
        }
        Ok(Mapped { pages, page })
    }
}

impl GrantCopier for Machine {
    fn copy(&self, ops: &mut [CopyOp<'_>]) {
        for op in ops {
            op.status = match self.map(op.domain, &[op.gref], Access::ReadWrite) {
                Ok(page) => {
                    let copied = match &mut op.with {
                        CopyBuf::FromGrant(to) => page.read_bytes(op.offset, to),
                        CopyBuf::ToGrant(from) => page.write_bytes(op.offset, from),
                    };
                    copied.map_or(GrantStatus::BadCopyArgument, |()| GrantStatus::Okay)
                }
                Err(status) => status,
            };
        }
    }
}

/// One side of an event channel.
pub struct End {
    port: Port,
    mine: Arc<AtomicBool>,
    theirs: Arc<AtomicBool>,
}

impl EventChannels for Machine {
    type Channel = End;

    fn alloc_unbound(&self, _remote: DomId) -> Result<End, EventError> {
        let channels = &mut self.0.borrow_mut().channels;
        channels.push(Default::default());
        let [mine, theirs] = channels[channels.len() - 1].clone();
        Ok(End { port: Port(channels.len() as u32), mine, theirs })
    }

    fn bind_interdomain(&self, _remote: DomId, port: Port) -> Result<End, EventError> {
        let index = port.0.checked_sub(1).ok_or(EventError::BadPort)?;
        let state = self.0.borrow();
        let ends = state.channels.get(index as usize).ok_or(EventError::BadPort)?;
        let [theirs, mine] = ends.clone();
        mine.store(true, Ordering::SeqCst);
        Ok(End { port, mine, theirs })
    }
}

impl EventChannel for End {
    fn port(&self) -> Port {
        self.port
    }

    fn notify(&self) -> Result<(), EventError> {
        self.theirs.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn take(&self) -> Result<bool, EventError> {
        Ok(self.mine.swap(false, Ordering::SeqCst))
    }
}
