//! The peer of a check.

use super::say;
use pvio_event_channel::{EventChannel, EventChannels, Port};
use pvio_grant_table::{Access, DomId, GrantRef, Granter};
use pvio_ring::shm::Region;
use pvio_xen_linux::{Channel, Pages, XenDomain};
use std::collections::HashMap;

/// Domain that grants pages and has event channels, on request of a check.
pub trait Peer {
    fn id(&self) -> DomId;
    /// Grants new pages to `to`.
    fn grant(&mut self, to: DomId, count: usize, access: Access) -> Result<Vec<GrantRef>, String>;
    fn end(&mut self, grefs: &[GrantRef]) -> Result<(), String>;
    fn write(&mut self, gref: GrantRef, at: usize, bytes: &[u8]) -> Result<(), String>;
    fn read(&mut self, gref: GrantRef, at: usize, len: usize) -> Result<Vec<u8>, String>;
    /// Allocates a port that `to` may bind to.
    fn alloc(&mut self, to: DomId) -> Result<Port, String>;
    fn notify(&mut self, port: Port, times: u32) -> Result<(), String>;
    /// Waits for an event, for at most `ms` milliseconds.
    fn wait(&mut self, port: Port, ms: u32) -> Result<bool, String>;
    fn close(&mut self, port: Port) -> Result<(), String>;
    /// Releases all grants and ports.
    fn forget(&mut self) -> Result<(), String>;
}

/// Peer in this process.
pub struct LocalPeer {
    domain: XenDomain,
    pages: HashMap<GrantRef, (Pages, usize)>,
    channels: HashMap<Port, Channel>,
}

impl LocalPeer {
    pub fn new(domain: XenDomain) -> Self {
        Self { domain, pages: HashMap::new(), channels: HashMap::new() }
    }

    fn page(&self, gref: GrantRef) -> Result<(&Pages, usize), String> {
        let (pages, page) = self.pages.get(&gref).ok_or("no such page")?;
        Ok((pages, page * 4096))
    }

    fn channel(&self, port: Port) -> Result<&Channel, String> {
        self.channels.get(&port).ok_or_else(|| "no such channel".into())
    }
}

impl Peer for LocalPeer {
    fn id(&self) -> DomId {
        self.domain.id()
    }

    fn grant(&mut self, to: DomId, count: usize, access: Access) -> Result<Vec<GrantRef>, String> {
        let pages = self.domain.alloc_pages(count).map_err(say)?;
        let mut grefs = Vec::new();
        for page in 0..count {
            let gref = self.domain.grant(to, &pages, page, access).map_err(say)?;
            self.pages.insert(gref, (pages.clone(), page));
            grefs.push(gref);
        }
        Ok(grefs)
    }

    fn end(&mut self, grefs: &[GrantRef]) -> Result<(), String> {
        // The pages stay allocated, so that a check can read them.
        grefs.iter().try_for_each(|gref| self.domain.end_access(*gref).map_err(say))
    }

    fn write(&mut self, gref: GrantRef, at: usize, bytes: &[u8]) -> Result<(), String> {
        let (pages, base) = self.page(gref)?;
        pages.write_bytes(base + at, bytes).ok_or_else(|| "out of range".into())
    }

    fn read(&mut self, gref: GrantRef, at: usize, len: usize) -> Result<Vec<u8>, String> {
        let (pages, base) = self.page(gref)?;
        let mut bytes = vec![0; len];
        pages.read_bytes(base + at, &mut bytes).ok_or("out of range")?;
        Ok(bytes)
    }

    fn alloc(&mut self, to: DomId) -> Result<Port, String> {
        let channel = self.domain.alloc_unbound(to).map_err(say)?;
        let port = channel.port();
        self.channels.insert(port, channel);
        Ok(port)
    }

    fn notify(&mut self, port: Port, times: u32) -> Result<(), String> {
        let channel = self.channel(port)?;
        (0..times).try_for_each(|_| channel.notify().map_err(say))
    }

    fn wait(&mut self, port: Port, ms: u32) -> Result<bool, String> {
        let timeout = std::time::Duration::from_millis(ms.into());
        self.channel(port)?.wait(Some(timeout)).map_err(say)
    }

    fn close(&mut self, port: Port) -> Result<(), String> {
        self.channels.remove(&port).map(drop).ok_or_else(|| "no such channel".into())
    }

    fn forget(&mut self) -> Result<(), String> {
        self.channels.clear();
        let mut grefs = self.pages.keys();
        let ended = grefs.try_for_each(|gref| self.domain.end_access(*gref).map_err(say));
        self.pages.clear();
        ended
    }
}
