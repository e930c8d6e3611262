//! Ends of event channels, as the hypervisor stores them.

use crate::events::signal;
use crate::layout::{CHANNEL_LEN, ChannelPage, EndIndex};
use crate::mem::sealed_memfd;
use pvio_event_channel::Port;
use pvio_grant_table::DomId;
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// An event channel. It stays the same while its ends are closed and bound again, so that an event
/// that was sent in between wakes the next process at that end.
#[derive(Debug)]
pub(crate) struct ChannelState {
    wakes: [Arc<OwnedFd>; 2],
    file: Arc<OwnedFd>,
    page: ChannelPage,
}

/// One end of an event channel: a port of a domain.
#[derive(Debug)]
pub(crate) struct End {
    /// Domain that may bind to the other end. `None` once that domain is destroyed, even if a new
    /// domain has its id: the memory that this end accesses is that of the destroyed one.
    pub(crate) remote: Option<DomId>,
    /// Connection that opened it.
    pub(crate) owner: u64,
    pub(crate) bound_to: Option<Port>,
    pub(crate) index: EndIndex,
    pub(crate) channel: Arc<ChannelState>,
}

impl ChannelState {
    /// Creates a channel without ends. Processes see `name` in their lists of mappings.
    pub(crate) fn new(name: &str) -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let file = sealed_memfd(name, CHANNEL_LEN)?;
        let page = ChannelPage::map(&file)?;
        let wakes = [Arc::new(eventfd(0, flags)?), Arc::new(eventfd(0, flags)?)];
        Ok(Self { wakes, file: Arc::new(file), page })
    }
}

impl End {
    /// Returns what the process at this end needs: its own eventfd, the peer's, and the page.
    pub(crate) fn files(&self) -> Vec<Arc<OwnedFd>> {
        let ChannelState { wakes, file, .. } = &*self.channel;
        let wake = |index: EndIndex| Arc::clone(&wakes[index as usize]);
        vec![wake(self.index), wake(self.index.peer()), Arc::clone(file)]
    }

    /// Stores for both processes whether both ends are open.
    pub(crate) fn set_bound(&self, bound: bool) {
        self.channel.page.set_bound(bound);
    }

    /// Wakes the process at this end, even if an event is pending already: that event may have been
    /// meant for a process that was killed after it was woken.
    pub(crate) fn raise(&self) {
        self.channel.page.raise(self.index);
        signal(&self.channel.wakes[self.index as usize]);
    }
}
