//! Staging grants: requests to the backend to keep the queues' pages mapped, and to unmap them.

use super::Ask;
use crate::queue::Queue;
use alloc::vec::Vec;
use pvio_event_channel::EventChannels;
use pvio_grant_table::{GrantRef, Granter};
use pvio_ring::proto::netif::{
    CtrlAsk, CtrlStatus, GREF_ENTRIES_MAX, GREF_ENTRY_SIZE, GrefEntry, GrefList,
};
use pvio_ring::shm::Region;

/// Status in an entry of a removal list before the backend writes one; not a defined status.
const UNANSWERED: u16 = u16::MAX;

/// Which pages are staged, and the next request.
#[derive(Debug)]
pub(super) struct Stage {
    at: At,
    /// Per queue, the number of pages of its list that are staged, from the first on.
    mapped: Vec<usize>,
    /// All pages are to be unstaged once the outstanding request has a response.
    leaves: bool,
    /// Number of entries of the last list.
    listed: usize,
    /// Number of entries that the backend did not report as unmapped.
    refused: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum At {
    /// Get the number of pages that this queue may stage.
    Size {
        queue: usize,
    },
    /// Stage at most this number of the queue's pages.
    Add {
        queue: usize,
        most: u32,
    },
    /// Unstage this queue's pages.
    Remove {
        queue: usize,
    },
    Done,
}

impl Stage {
    /// Creates the state; `wanted` is whether pages are staged at all.
    pub const fn new(wanted: bool) -> Self {
        let at = if wanted { At::Size { queue: 0 } } else { At::Done };
        Self { at, mapped: Vec::new(), leaves: false, listed: 0, refused: 0 }
    }

    pub fn is_done(&self) -> bool {
        self.at == At::Done
    }

    /// Returns the number of staged pages of all queues.
    pub fn staged(&self) -> usize {
        self.mapped.iter().fold(0, |sum, mapped| sum.saturating_add(*mapped))
    }

    /// Returns the number of entries that the backend did not report as unmapped.
    pub const fn refused(&self) -> usize {
        self.refused
    }

    /// Starts to unstage all pages; `under_way` is whether a staging request is outstanding.
    pub fn leave(&mut self, under_way: bool) {
        self.leaves = true;
        if !under_way {
            self.at = At::Remove { queue: 0 };
        }
    }

    /// Returns whether pages are being unstaged, which takes precedence over other requests.
    pub const fn is_leaving(&self) -> bool {
        self.leaves
    }

    /// Returns the next request, with its list as the contents of `page`.
    pub fn next<P: Granter + EventChannels>(
        &mut self,
        queues: &[Queue<P>],
        page: GrantRef,
    ) -> Option<Ask> {
        loop {
            let (queue, most) = match self.at {
                At::Done => return None,
                At::Size { queue } => {
                    return Some(CtrlAsk::GetGrefMappingSize { queue: queue as u32 }.into());
                }
                At::Add { queue, most } => (queue, GREF_ENTRIES_MAX.min(most as usize)),
                At::Remove { queue } => {
                    let Some(mapped) = self.mapped.get(queue).copied() else {
                        self.at = At::Done;
                        continue;
                    };
                    if mapped == 0 {
                        self.at = At::Remove { queue: queue.saturating_add(1) };
                        continue;
                    }
                    (queue, mapped)
                }
            };
            let Some(of) = queues.get(queue) else {
                self.at = At::Done;
                continue;
            };
            let adds = matches!(self.at, At::Add { .. });
            let status = if adds { 0 } else { UNANSWERED };
            let list: Vec<u8> = of
                .staging_list()
                .take(most)
                .flat_map(|entry| GrefEntry { status, ..entry }.to_bytes())
                .collect();
            self.listed = list.len() / GREF_ENTRY_SIZE;
            let grefs = GrefList { queue: queue as u32, page, len: self.listed as u32 };
            let what =
                if adds { CtrlAsk::AddGrefMapping(grefs) } else { CtrlAsk::DelGrefMapping(grefs) };
            return Some(Ask { what, page: list });
        }
    }

    /// Processes the response to the last request; `list` is the page with the entries.
    pub fn answered(&mut self, status: u32, data: u32, list: &impl Region, queues: usize) {
        let done = status == CtrlStatus::Success as u32;
        self.mapped.resize(queues, 0);
        self.at = match self.at {
            At::Size { queue } if done && data > 0 => At::Add { queue, most: data },
            At::Add { queue, .. } if done => {
                self.set_mapped(queue, self.listed);
                let queue = queue.saturating_add(1);
                if queue < queues { At::Size { queue } } else { At::Done }
            }
            At::Remove { queue } => {
                let left = if done { refused(list, self.listed) } else { self.listed };
                self.refused = self.refused.saturating_add(left);
                self.set_mapped(queue, 0);
                At::Remove { queue: queue.saturating_add(1) }
            }
            // The backend stages no pages, or no more: it accesses the others with a grant
            // operation each.
            _ => At::Done,
        };
        if self.leaves && !matches!(self.at, At::Remove { .. }) {
            self.at = At::Remove { queue: 0 };
        }
    }

    fn set_mapped(&mut self, queue: usize, pages: usize) {
        if let Some(mapped) = self.mapped.get_mut(queue) {
            *mapped = pages;
        }
    }
}

/// Returns how many of the first `entries` entries of a list were not unmapped. Each is read once,
/// and every status other than success counts.
fn refused(list: &impl Region, entries: usize) -> usize {
    let mut bytes = [0; GREF_ENTRY_SIZE];
    let failed = |at: &usize| {
        let read = list.read_bytes(at.saturating_mul(GREF_ENTRY_SIZE), &mut bytes);
        read.is_none() || GrefEntry::from_bytes(bytes).status != CtrlStatus::Success as u16
    };
    (0..entries).filter(failed).count()
}
