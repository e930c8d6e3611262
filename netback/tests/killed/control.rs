//! The guest's side of the control ring.

use crate::common::{BACK, FRONT};
use crate::guest::Guest;
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{Access, GrantRef, Granter};
use pvio_netback::queue::ControlRefs;
use pvio_ring::FrontRing;
use pvio_ring::proto::netif::{
    CTRL_SLOT_SIZE, CtrlAsk, CtrlRequest, CtrlResponse, CtrlStatus, GrefEntry, GrefList,
    HASH_TOEPLITZ, HashTypes,
};
use pvio_ring::shm::Region;
use pvio_sim::LocalDomain;
use pvio_sim::local::events::LocalChannel;
use pvio_sim::local::memory::LocalPages;

/// Number of pages that are staged for the last queue; some of them are removed later.
const STAGED: usize = 12;
const TAKEN_BACK: usize = 5;
/// Number of requests, which are made one at a time.
const REQUESTS: u16 = 8;

pub struct Control {
    ring: FrontRing<LocalPages>,
    channel: LocalChannel,
    page: LocalPages,
    ring_gref: GrantRef,
    gref: GrantRef,
    /// Number of the last queue, and its pages.
    queue: u32,
    pages: Vec<GrantRef>,
    asked: u16,
    answered: u16,
}

impl Control {
    pub fn new(domain: &LocalDomain, last: &Guest) -> Self {
        assert_eq!(domain.id(), FRONT);
        let (ring_page, page) = (domain.alloc_pages(1).unwrap(), domain.alloc_pages(1).unwrap());
        let grant = |page: &LocalPages| domain.grant(BACK, page, 0, Access::ReadWrite).unwrap();
        let (ring_gref, gref) = (grant(&ring_page), grant(&page));
        Self {
            ring: FrontRing::init(ring_page, CTRL_SLOT_SIZE).unwrap(),
            channel: domain.alloc_unbound(BACK).unwrap(),
            page,
            ring_gref,
            gref,
            queue: last.number().into(),
            pages: last.grefs()[..STAGED].to_vec(),
            asked: 0,
            answered: 0,
        }
    }

    pub fn refs(&self) -> ControlRefs {
        ControlRefs { ring: self.ring_gref, event: self.channel.port() }
    }

    /// Makes the next request if the last one has its response.
    pub fn ask(&mut self) {
        if self.asked != self.answered || self.asked == REQUESTS {
            return;
        }
        let (page, queue) = (self.gref, self.queue);
        let list = |len: usize| GrefList { queue, page, len: len as u32 };
        let entries = |pages: &[GrantRef]| -> Vec<u8> {
            let entry = |gref: &GrantRef| GrefEntry { gref: *gref, read_only: false, status: 9 };
            pages.iter().flat_map(|gref| entry(gref).to_bytes()).collect()
        };
        let (bytes, ask) = match self.asked {
            0 => (vec![], CtrlAsk::SetHashAlgorithm(HASH_TOEPLITZ)),
            1 => (vec![], CtrlAsk::SetHashFlags(HashTypes::all().bits())),
            2 => (vec![7; 40], CtrlAsk::SetHashKey { page, len: 40 }),
            3 => (vec![], CtrlAsk::SetHashMappingSize(4)),
            4 => {
                let mapping = [queue; 4].map(u32::to_le_bytes).concat();
                (mapping, CtrlAsk::SetHashMapping { page, len: 4, offset: 0 })
            }
            5 => (entries(&self.pages), CtrlAsk::AddGrefMapping(list(STAGED))),
            6 => {
                let some = entries(&self.pages[..TAKEN_BACK]);
                (some, CtrlAsk::DelGrefMapping(list(TAKEN_BACK)))
            }
            _ => (vec![], CtrlAsk::GetGrefMappingSize { queue: 0 }),
        };
        self.page.write_bytes(0, &bytes).unwrap();
        self.ring.push(&CtrlRequest::new(self.asked, ask).to_bytes()).unwrap();
        let _ = self.ring.publish();
        self.asked += 1;
    }

    pub fn take(&mut self) {
        while let Some(mut slot) = self.ring.pop().unwrap() {
            let response = CtrlResponse::read(&mut slot).unwrap();
            let (id, status) = (self.answered, CtrlStatus::Success as u32);
            assert!(id < self.asked, "response without a request");
            let data = match id {
                6 => TAKEN_BACK as u32,
                7 => pvio_netback::queue::STAGED_MAX as u32,
                _ => 0,
            };
            assert_eq!((response.id, response.status, response.data), (id, status, data));
            if id == 6 {
                let mut bytes = [0; 8 * TAKEN_BACK];
                self.page.read_bytes(0, &mut bytes).unwrap();
                let statuses = bytes.chunks(8).map(|entry| entry[6]);
                assert!(statuses.eq([CtrlStatus::Success as u8; TAKEN_BACK]));
            }
            self.answered += 1;
        }
    }

    pub fn is_done(&self) -> bool {
        self.answered == REQUESTS
    }

    /// Returns the number of pages that are staged at the end.
    pub fn staged(&self) -> usize {
        STAGED - TAKEN_BACK
    }
}
