//! The guest's memory, with some granted pages: a grant reference is a page's number.

use pvio_event_channel::{EventChannel, EventChannels, EventError, Port};
use pvio_grant_table::{
    Access, CopyBuf, CopyOp, DomId, GrantCopier, GrantMapper, GrantRef, GrantStatus,
};
use pvio_netback::queue::{ControlRefs, EventPorts, QueueRefs};
use pvio_recordfile::RecordFile;
use pvio_ring::shm::{PAGE_SIZE, Part, Region};

pub const FRONT: DomId = DomId(7);
pub const QUEUES: usize = 2;
/// Number of pages that a queue sends from, and of those that it receives in. Each has an adjacent
/// page that is not granted.
pub const PAGES: usize = 32;
/// Page of the control ring; the next page holds the data of its requests.
pub const CONTROL: usize = 2 * QUEUES;
pub const CONTROL_DATA: usize = CONTROL + 1;
const DATA: usize = CONTROL_DATA + 1;
const ALL: usize = DATA + QUEUES * 4 * PAGES;
pub const MEMORY: usize = ALL * PAGE_SIZE;

/// Returns the number of a page that a queue sends from or receives in.
pub const fn data(queue: usize, receives: bool, page: usize) -> usize {
    DATA + 2 * ((2 * queue + receives as usize) * PAGES + page)
}

/// Returns the pages that are not granted.
pub fn ungranted() -> impl Iterator<Item = usize> {
    (DATA + 1..ALL).step_by(2)
}

/// Whether a backend may write to the page, and whether it may read it.
fn allows(page: usize) -> (bool, bool) {
    match page {
        ..DATA => (true, true),
        _ if !(page - DATA).is_multiple_of(2) => (false, false),
        _ => {
            let receives = (page - DATA) / 2 / PAGES % 2 == 1;
            (receives, !receives)
        }
    }
}

pub fn queue_refs() -> Vec<QueueRefs> {
    let gref = |page: usize| GrantRef(page as u32);
    let refs = |queue| QueueRefs {
        tx_ring: gref(2 * queue),
        rx_ring: gref(2 * queue + 1),
        events: EventPorts::Shared(Port(1 + queue as u32)),
    };
    (0..QUEUES).map(refs).collect()
}

pub fn control_refs() -> ControlRefs {
    ControlRefs { ring: GrantRef(CONTROL as u32), event: Port(9) }
}

#[derive(Clone)]
pub struct Memory(pub RecordFile);

impl Memory {
    pub fn page(&self, number: usize) -> Part<RecordFile> {
        Part::new(self.0.clone(), number * PAGE_SIZE, PAGE_SIZE).unwrap()
    }
}

impl GrantMapper for Memory {
    type Mapping = Part<RecordFile>;

    fn map(&self, _: DomId, grefs: &[GrantRef], _: Access) -> Result<Self::Mapping, GrantStatus> {
        let [GrantRef(page)] = grefs else { return Err(GrantStatus::NoSpace) };
        assert!((*page as usize) < CONTROL_DATA, "page {page} is no ring");
        Ok(self.page(*page as usize))
    }
}

impl GrantCopier for Memory {
    fn copy(&self, ops: &mut [CopyOp<'_>]) {
        for op in ops {
            let number = op.gref.0 as usize;
            let (written, read) = allows(number);
            let page = self.page(number);
            match &mut op.with {
                CopyBuf::FromGrant(to) => {
                    assert!(read, "page {number} is read");
                    page.read_bytes(op.offset, to).unwrap();
                }
                CopyBuf::ToGrant(from) => {
                    assert!(written, "page {number} is written");
                    page.write_bytes(op.offset, from).unwrap();
                }
            }
            op.status = GrantStatus::Okay;
        }
    }
}

/// Channel without events: both sides poll the rings continuously.
pub struct Silent(Port);

impl EventChannels for Memory {
    type Channel = Silent;

    fn alloc_unbound(&self, _: DomId) -> Result<Silent, EventError> {
        Err(EventError::NoPorts)
    }

    fn bind_interdomain(&self, _: DomId, port: Port) -> Result<Silent, EventError> {
        Ok(Silent(port))
    }
}

impl EventChannel for Silent {
    fn port(&self) -> Port {
        self.0
    }

    fn notify(&self) -> Result<(), EventError> {
        Ok(())
    }

    fn take(&self) -> Result<bool, EventError> {
        Ok(false)
    }
}
