//! The control ring, frontend side: how received packets are spread over the queues ([`Steering`]), and
//! which of the queues' pages the backend keeps mapped (netif's staging grants). Packets go the same way
//! whether the backend does any of it or not, and before it does.

mod stage;
mod steer;

use crate::fault::{BackendFault, SetupError};
use crate::granted::Granted;
use crate::queue::Queue;
use crate::steering::{Steering, SteeringState};
use alloc::vec::Vec;
use core::fmt;
use core::time::Duration;
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_grant_table::{Access, DomId, GrantRef, Granter};
use pvio_ring::FrontRing;
use pvio_ring::proto::netif::{CTRL_SLOT_SIZE, CtrlAsk, CtrlRequest, CtrlResponse};
use pvio_ring::shm::Region;
use stage::Stage;
use steer::Steer;

/// After how long a request counts as one that is never answered.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// The control ring of a NIC. To be [stepped](Self::step) now and then until it is
/// [done](Self::is_done): there is one request under way at a time.
pub struct Control<P: Granter + EventChannels> {
    ring: FrontRing<P::Pages>,
    ring_page: Granted<P>,
    /// What a request is about that does not fit its slot: a key, a table, a list.
    page: Granted<P>,
    channel: P::Channel,
    /// The request that is not answered yet.
    asked: Option<Asked>,
    next_id: u16,
    steer: Steer,
    stage: Stage,
    now: Duration,
    failed: Option<BackendFault>,
}

/// A request, and what has to be in the page that it names.
struct Ask {
    what: CtrlAsk,
    page: Vec<u8>,
}

impl From<CtrlAsk> for Ask {
    fn from(what: CtrlAsk) -> Self {
        Self { what, page: Vec::new() }
    }
}

#[derive(Clone, Copy)]
struct Asked {
    request: CtrlRequest,
    about: About,
    since: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum About {
    Steering,
    Staging,
}

impl<P: Granter + EventChannels + Clone> Control<P> {
    /// Allocates and grants the ring, and makes an event channel.
    ///
    /// # Errors
    /// [`SetupError`]; everything made so far is taken back.
    pub fn new(platform: &P, backend: DomId) -> Result<Self, SetupError> {
        let granted = || Granted::new(platform.clone(), backend, 1, Access::ReadWrite);
        let (ring_page, page) = (granted()?, granted()?);
        Ok(Self {
            ring: FrontRing::init(ring_page.pages().clone(), CTRL_SLOT_SIZE)?,
            ring_page,
            page,
            channel: platform.alloc_unbound(backend)?,
            asked: None,
            next_id: 0,
            steer: Steer::default(),
            stage: Stage::new(true),
            now: Duration::ZERO,
            failed: None,
        })
    }
}

impl<P: Granter + EventChannels> Control<P> {
    /// The same, which does not ask the backend to keep pages mapped.
    #[must_use]
    pub fn without_staging(self) -> Self {
        Self { stage: Stage::new(false), ..self }
    }

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

    /// Has received packets spread so over this many queues from now on, or (`None`) as the backend
    /// likes. What was asked before and is not done yet is not done.
    pub fn steer(&mut self, steering: Option<Steering>, queues: usize) {
        let under_way = self.is_asking(About::Steering);
        self.steer.want(steering, queues, under_way);
    }

    /// How far the backend goes by what it was told to [`steer`](Self::steer) by.
    #[must_use]
    pub const fn steering(&self) -> SteeringState {
        self.steer.state()
    }

    /// Has the backend unmap all pages that it was asked to keep mapped, before a NIC is closed, say. None
    /// are staged again.
    pub fn unstage(&mut self) {
        let under_way = self.is_asking(About::Staging);
        self.stage.leave(under_way);
    }

    /// Tells the time, counted from any moment, and never backwards: for [`is_silent`](Self::is_silent).
    pub const fn set_clock(&mut self, now: Duration) {
        self.now = now;
    }

    /// Whether there is nothing more to ask.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.asked.is_none() && self.steer.is_done() && self.stage.is_done()
    }

    /// Whether the backend has left a request unanswered for [`PATIENCE`], by the clock that it was
    /// [told](Self::set_clock). Nothing else is asked of it then; a late answer is taken all the same.
    #[must_use]
    pub fn is_silent(&self) -> bool {
        self.asked.is_some_and(|asked| self.now.saturating_sub(asked.since) >= PATIENCE)
    }

    /// Pages that the backend keeps mapped, by its word.
    #[must_use]
    pub fn staged(&self) -> usize {
        self.stage.staged()
    }

    /// Pages that the backend did not unmap when it was asked to, by its word. Whether it has them mapped
    /// is told by the hypervisor alone, when they are to be taken back.
    #[must_use]
    pub const fn not_unstaged(&self) -> usize {
        self.stage.refused()
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

    /// To be called before waiting for an event: asks to be woken for the answer, and looks once more.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn final_check(&mut self) -> Result<bool, BackendFault> {
        if self.asked.is_none() {
            return Ok(false);
        }
        let checked = self.ring.final_check().map_err(BackendFault::CtrlRing);
        checked.inspect_err(|fault| self.failed = Some(*fault))
    }

    /// Ends what grants it can, and tells whether none is left.
    pub(crate) fn revoke(&mut self) -> bool {
        let page = self.page.revoke();
        self.ring_page.revoke() && page
    }

    fn is_asking(&self, about: About) -> bool {
        self.asked.is_some_and(|asked| asked.about == about)
    }

    fn take_answer(&mut self, queues: usize) -> Result<(), BackendFault> {
        let Some(mut slot) = self.ring.pop().map_err(BackendFault::CtrlRing)? else {
            return Ok(());
        };
        // A slot of the ring's size is never short.
        let CtrlResponse { id, kind, status, data } =
            CtrlResponse::read(&mut slot).unwrap_or_default();
        let answers = |asked: &Asked| (asked.request.id, asked.request.kind) == (id, kind);
        match self.asked.take().filter(answers).map(|asked| asked.about) {
            None => return Err(BackendFault::CtrlAnswer { id, kind }),
            Some(About::Steering) => self.steer.answered(kind, status, data, queues),
            Some(About::Staging) => self.stage.answered(status, data, self.page.pages(), queues),
        }
        Ok(())
    }

    fn ask(&mut self, queues: &[Queue<P>]) -> Result<(), BackendFault> {
        if self.asked.is_some() {
            return Ok(());
        }
        let Some((about, Ask { what, page })) = self.next(queues) else { return Ok(()) };
        let written = self.page.pages().write_bytes(0, &page);
        debug_assert!(written.is_some(), "a page has room for the longest of them");
        let request = CtrlRequest::new(self.next_id, what);
        self.next_id = self.next_id.wrapping_add(1);
        // One request at a time, so there is room.
        let pushed = self.ring.push(&request.to_bytes());
        debug_assert!(pushed.is_ok(), "more requests than slots");
        self.asked = Some(Asked { request, about, since: self.now });
        if self.ring.publish() {
            self.channel.notify()?;
        }
        Ok(())
    }

    /// What is asked next: first what has to be done before an end, then what packets go by.
    fn next(&mut self, queues: &[Queue<P>]) -> Option<(About, Ask)> {
        let (page, leaves) = (self.page.gref(0), self.stage.is_leaving());
        let Self { steer, stage, .. } = self;
        let mut steer = || steer.next(page).map(|ask| (About::Steering, ask));
        let mut stage = || stage.next(queues, page).map(|ask| (About::Staging, ask));
        if leaves { stage().or_else(steer) } else { steer().or_else(stage) }
    }
}

impl<P: Granter + EventChannels> fmt::Debug for Control<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control")
            .field("steering", &self.steering())
            .field("staged", &self.staged())
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}
