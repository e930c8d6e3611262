//! The control ring, frontend side: it has the backend keep the queues' pages mapped (netif's staging
//! grants), where the backend can. Packets go the same way whether it does or not, and before it does;
//! they only cost less.

use crate::fault::{BackendFault, SetupError};
use crate::granted::Granted;
use crate::queue::Queue;
use core::fmt;
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{Access, DomId, GrantRef, Granter};
use pvio_ring::FrontRing;
use pvio_ring::proto::netif::{
    CTRL_SLOT_SIZE, CtrlAsk, CtrlRequest, CtrlResponse, CtrlStatus, GREF_ENTRIES_MAX,
    GREF_ENTRY_SIZE, GrefList,
};
use pvio_ring::shm::Region;

/// The control ring of a NIC. To be [stepped](Self::step) now and then until it is
/// [done](Self::is_done): there is one request under way at a time.
pub struct Control<P: Granter + EventChannels> {
    ring: FrontRing<P::Pages>,
    ring_page: Granted<P>,
    /// The list of pages that a request is about.
    list: Granted<P>,
    channel: P::Channel,
    /// What is to be asked next.
    next: Next,
    /// The request that is not answered yet, and how many pages it names.
    asked: Option<(CtrlRequest, usize)>,
    next_id: u16,
    staged: usize,
    failed: Option<BackendFault>,
}

/// What is to be asked next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    /// How many pages this queue may have.
    Size { queue: u32 },
    /// To keep so many pages of this queue.
    Add { queue: u32, most: u32 },
    /// Nothing.
    Done,
}

impl<P: Granter + EventChannels + Clone> Control<P> {
    /// Allocates and grants the ring, and makes an event channel.
    ///
    /// # Errors
    /// [`SetupError`]; everything made so far is taken back.
    pub fn new(platform: &P, backend: DomId) -> Result<Self, SetupError> {
        let granted = || Granted::new(platform.clone(), backend, 1, Access::ReadWrite);
        let (ring_page, list) = (granted()?, granted()?);
        Ok(Self {
            ring: FrontRing::init(ring_page.pages().clone(), CTRL_SLOT_SIZE)?,
            ring_page,
            list,
            channel: platform.alloc_unbound(backend)?,
            next: Next::Size { queue: 0 },
            asked: None,
            next_id: 0,
            staged: 0,
            failed: None,
        })
    }
}

impl<P: Granter + EventChannels> Control<P> {
    /// The ring's page, for the handshake.
    #[must_use]
    pub fn ring_gref(&self) -> GrantRef {
        self.ring_page.gref(0)
    }

    /// Our end of its event channel. Nobody need wait for it: an answer is found by the next
    /// [`step`](Self::step).
    #[must_use]
    pub fn channel(&self) -> &P::Channel {
        &self.channel
    }

    /// Whether there is nothing more to ask.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.next == Next::Done && self.asked.is_none()
    }

    /// Pages that the backend keeps mapped, by its word.
    #[must_use]
    pub fn staged(&self) -> usize {
        self.staged
    }

    /// What the backend did, if it broke the rules here.
    #[must_use]
    pub fn fault(&self) -> Option<BackendFault> {
        self.failed
    }

    /// Takes the answer to what was asked, if it is there, and asks what comes next.
    ///
    /// # Errors
    /// A [`BackendFault`], now and for ever: the NIC is finished.
    pub fn step(&mut self, queues: &[Queue<P>]) -> Result<(), BackendFault> {
        if let Some(fault) = self.failed {
            return Err(fault);
        }
        let stepped = self.take_answer(queues.len()).and_then(|()| self.ask(queues));
        stepped.inspect_err(|fault| self.failed = Some(*fault))
    }

    /// Ends what grants it can, and tells whether none is left.
    pub(crate) fn revoke(&mut self) -> bool {
        let list = self.list.revoke();
        self.ring_page.revoke() && list
    }

    fn take_answer(&mut self, queues: usize) -> Result<(), BackendFault> {
        let Some(mut slot) = self.ring.pop().map_err(BackendFault::CtrlRing)? else {
            return Ok(());
        };
        // A slot of the ring's size is never short.
        let CtrlResponse { id, kind, status, data } =
            CtrlResponse::read(&mut slot).unwrap_or_default();
        let asked = self.asked.take().filter(|(asked, _)| (asked.id, asked.kind) == (id, kind));
        let Some((_, pages)) = asked else {
            return Err(BackendFault::CtrlAnswer { id, kind });
        };
        let done = CtrlStatus::from_number(status) == Some(CtrlStatus::Success);
        self.next = match self.next {
            Next::Size { queue } if done && data > 0 => Next::Add { queue, most: data },
            Next::Add { queue, .. } if done => {
                self.staged = self.staged.saturating_add(pages);
                let queue = queue.saturating_add(1);
                if (queue as usize) < queues { Next::Size { queue } } else { Next::Done }
            }
            // It keeps none, or no more: what it has not it reaches as it always did.
            _ => Next::Done,
        };
        Ok(())
    }

    fn ask(&mut self, queues: &[Queue<P>]) -> Result<(), BackendFault> {
        if self.asked.is_some() {
            return Ok(());
        }
        let (ask, pages) = match self.next {
            Next::Done => return Ok(()),
            Next::Size { queue } => (CtrlAsk::GetGrefMappingSize { queue }, 0),
            Next::Add { queue, most } => {
                let Some(of) = queues.get(queue as usize) else { return Ok(()) };
                let most = GREF_ENTRIES_MAX.min(most as usize);
                let mut at = 0_usize;
                for entry in of.staging_list().take(most) {
                    let written = self.list.pages().write_bytes(at, &entry.to_bytes());
                    debug_assert!(written.is_some(), "a page has room for so many");
                    at = at.saturating_add(GREF_ENTRY_SIZE);
                }
                let len = at / GREF_ENTRY_SIZE;
                let list = GrefList { queue, page: self.list.gref(0), len: len as u32 };
                (CtrlAsk::AddGrefMapping(list), len)
            }
        };
        let request = CtrlRequest::new(self.next_id, ask);
        self.next_id = self.next_id.wrapping_add(1);
        // One request at a time, so there is room.
        let pushed = self.ring.push(&request.to_bytes());
        debug_assert!(pushed.is_ok(), "more requests than slots");
        self.asked = Some((request, pages));
        if self.ring.publish() {
            self.channel.notify()?;
        }
        Ok(())
    }
}

impl<P: Granter + EventChannels> fmt::Debug for Control<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control")
            .field("staged", &self.staged)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}
