//! A domain whose every call, and every store to a peer's memory, is told of first.

use super::LocalDomain;
use super::events::LocalChannel;
use super::memory::LocalMapping;
use pvio_event_channel::{EventChannel, EventChannels, EventError, Port};
use pvio_grant_table::{Access, CopyOp, DomId, GrantCopier, GrantMapper, GrantRef, GrantStatus};
use pvio_ring::shm::Watched;
use std::fmt;
use std::sync::Arc;

/// Called before each step. It may end the step, and whoever makes it, by unwinding.
pub type Watch = Arc<dyn Fn() + Send + Sync>;

/// The platform of a backend that is watched: each store to a mapping, each mapping, copy, binding and
/// notification. For tests that end a backend at every one of its steps.
#[derive(Clone)]
pub struct WatchedDomain {
    domain: LocalDomain,
    watch: Watch,
}

/// An event channel of a [`WatchedDomain`].
pub struct WatchedChannel {
    channel: LocalChannel,
    watch: Watch,
}

impl WatchedDomain {
    /// `domain`, with `watch` called before each of its steps.
    #[must_use]
    pub fn new(domain: LocalDomain, watch: Watch) -> Self {
        Self { domain, watch }
    }

    /// The domain itself.
    #[must_use]
    pub fn domain(&self) -> &LocalDomain {
        &self.domain
    }

    fn channel(&self, channel: LocalChannel) -> WatchedChannel {
        WatchedChannel { channel, watch: Arc::clone(&self.watch) }
    }
}

impl WatchedChannel {
    /// As [`LocalChannel::is_pending`].
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.channel.is_pending()
    }
}

impl GrantMapper for WatchedDomain {
    type Mapping = Watched<LocalMapping>;

    fn map(
        &self,
        domain: DomId,
        grefs: &[GrantRef],
        access: Access,
    ) -> Result<Watched<LocalMapping>, GrantStatus> {
        (self.watch)();
        let mapping = self.domain.map(domain, grefs, access)?;
        Ok(Watched::new(mapping, Arc::clone(&self.watch)))
    }
}

impl GrantCopier for WatchedDomain {
    fn copy(&self, ops: &mut [CopyOp<'_>]) {
        (self.watch)();
        self.domain.copy(ops);
    }
}

impl EventChannels for WatchedDomain {
    type Channel = WatchedChannel;

    fn alloc_unbound(&self, remote: DomId) -> Result<WatchedChannel, EventError> {
        (self.watch)();
        Ok(self.channel(self.domain.alloc_unbound(remote)?))
    }

    fn bind_interdomain(&self, remote: DomId, port: Port) -> Result<WatchedChannel, EventError> {
        (self.watch)();
        Ok(self.channel(self.domain.bind_interdomain(remote, port)?))
    }
}

impl EventChannel for WatchedChannel {
    fn port(&self) -> Port {
        self.channel.port()
    }

    fn notify(&self) -> Result<(), EventError> {
        (self.watch)();
        self.channel.notify()
    }

    fn take(&self) -> Result<bool, EventError> {
        (self.watch)();
        self.channel.take()
    }

    fn mask(&self) {
        self.channel.mask();
    }

    fn unmask(&self) {
        self.channel.unmask();
    }
}

impl fmt::Debug for WatchedDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WatchedDomain").field(&self.domain).finish()
    }
}

impl fmt::Debug for WatchedChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WatchedChannel").field(&self.port()).finish()
    }
}
