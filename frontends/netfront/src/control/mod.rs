//! The control ring, frontend side: distribution of received packets over the queues
//! ([`Steering`]), and staging grants, pages that the backend keeps mapped on request. Both are
//! optional: packets are transferred without them, and before they are configured.

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

/// Time after which a request is considered unanswered.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// The control ring of a NIC. It must be [stepped](Self::step) regularly until it is
/// [done](Self::is_done): at most one request is outstanding.
pub struct Control<P: Granter + EventChannels> {
    ring: FrontRing<P::Pages>,
    ring_page: Granted<P>,
    /// Request data that do not fit into a slot: a key, a table, a list.
    page: Granted<P>,
    channel: P::Channel,
    /// The outstanding request.
    asked: Option<Asked>,
    next_id: u16,
    steer: Steer,
    stage: Stage,
    now: Duration,
    failed: Option<BackendFault>,
}

/// A request, and the contents of the page that it names.
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
    /// [`SetupError`]; everything made so far is released.
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
    /// Disables staging grants: the backend is not requested to keep pages mapped.
    #[must_use]
    pub fn without_staging(self) -> Self {
        Self { stage: Stage::new(false), ..self }
    }

    /// Returns the grant reference of the ring's page, for the handshake.
    #[must_use]
    pub fn ring_gref(&self) -> GrantRef {
        self.ring_page.gref(0)
    }

    /// Returns this side's event channel. Waiting for it is optional: the next [`step`](Self::step)
    /// finds a response in any case.
    #[must_use]
    pub fn channel(&self) -> &P::Channel {
        &self.channel
    }

    /// Requests this distribution of received packets over `queues` queues, or (`None`) leaves the
    /// choice to the backend. It replaces an earlier configuration that is not complete.
    pub fn steer(&mut self, steering: Option<Steering>, queues: usize) {
        let under_way = self.is_asking(About::Steering);
        self.steer.want(steering, queues, under_way);
    }

    /// Returns the state of the steering that was last [requested](Self::steer).
    #[must_use]
    pub const fn steering(&self) -> SteeringState {
        self.steer.state()
    }

    /// Requests the backend to unmap all staged pages, for example before a NIC is closed. No pages
    /// are staged again.
    pub fn unstage(&mut self) {
        let under_way = self.is_asking(About::Staging);
        self.stage.leave(under_way);
    }

    /// Sets the current time, relative to any origin, never decreasing; used by
    /// [`is_silent`](Self::is_silent).
    pub const fn set_clock(&mut self, now: Duration) {
        self.now = now;
    }

    /// Returns whether no request is outstanding or left to send.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.asked.is_none() && self.steer.is_done() && self.stage.is_done()
    }

    /// Returns whether a request has been outstanding for [`PATIENCE`], by the
    /// [clock](Self::set_clock). No other request is sent then; a late response is still accepted.
    #[must_use]
    pub fn is_silent(&self) -> bool {
        self.asked.is_some_and(|asked| self.now.saturating_sub(asked.since) >= PATIENCE)
    }

    /// Returns the number of pages that the backend reported as staged.
    #[must_use]
    pub fn staged(&self) -> usize {
        self.stage.staged()
    }

    /// Returns the number of pages that the backend did not report as unmapped when requested.
    /// Whether they are mapped is known only from the hypervisor, when the grants are revoked.
    #[must_use]
    pub const fn not_unstaged(&self) -> usize {
        self.stage.refused()
    }

    /// Returns the backend's protocol violation on this ring, if there was one.
    #[must_use]
    pub fn fault(&self) -> Option<BackendFault> {
        self.failed
    }

    /// Takes the response to the outstanding request, if there is one, and sends the next request.
    ///
    /// # Errors
    /// A [`BackendFault`], which is permanent: the NIC is unusable.
    pub fn step(&mut self, queues: &[Queue<P>]) -> Result<(), BackendFault> {
        if let Some(fault) = self.failed {
            return Err(fault);
        }
        let stepped = self.take_answer(queues.len()).and_then(|()| self.ask(queues));
        stepped.inspect_err(|fault| self.failed = Some(*fault))
    }

    /// Arms a notification for the response and checks again for it. To be called before waiting
    /// for an event.
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

    /// Ends the grants that are not in use, and returns whether none is left.
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
        // A slot of the ring is never shorter than a response.
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
        // At most one request is outstanding, so a slot is free.
        let pushed = self.ring.push(&request.to_bytes());
        debug_assert!(pushed.is_ok(), "more requests than slots");
        self.asked = Some(Asked { request, about, since: self.now });
        if self.ring.publish() {
            self.channel.notify()?;
        }
        Ok(())
    }

    /// Returns the next request. Steering comes first, unless pages are being unstaged.
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
