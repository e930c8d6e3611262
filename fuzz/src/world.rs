//! A device between two domains with its keys in xenstore, which hostile parties rewrite.

use crate::{BACK, Domains, FRONT};
use arbitrary::Arbitrary;
use pvio_event_channel::{DomId, EventChannel, EventChannels};
use pvio_grant_table::{Access, GrantRef, Granter};
use pvio_sim::local::events::LocalChannel;
use pvio_sim::local::memory::LocalPages;
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr, create_domain, remove_backend};
use pvio_xenbus::handshake::{vbd, vif};
use pvio_xenbus::{XenbusState, Xenstore};
use pvio_xenstored::{LocalClient, Quota, Store};
use std::cell::RefCell;
use std::rc::Rc;

/// Keys of both kinds of devices, in either directory.
const KEYS: [&str; 72] = [
    "state",
    "state",
    "state",
    "online",
    "ring-ref",
    "ring-ref0",
    "ring-ref1",
    "event-channel",
    "protocol",
    "ring-page-order",
    "num-ring-pages",
    "multi-queue-num-queues",
    "multi-queue-max-queues",
    "feature-persistent",
    "queue-0/ring-ref",
    "queue-0/event-channel",
    "queue-1/ring-ref",
    "queue-1/event-channel",
    "queue-0/ring-ref0",
    "queue-0/tx-ring-ref",
    "queue-0/rx-ring-ref",
    "queue-0/event-channel-tx",
    "queue-0/event-channel-rx",
    "tx-ring-ref",
    "rx-ring-ref",
    "event-channel-tx",
    "event-channel-rx",
    "ctrl-ring-ref",
    "event-channel-ctrl",
    "request-rx-copy",
    "feature-rx-notify",
    "feature-sg",
    "feature-gso-tcpv4",
    "feature-gso-tcpv4-prefix",
    "feature-no-csum-offload",
    "feature-ipv6-csum-offload",
    "feature-multicast-control",
    "request-multicast-control",
    "feature-dynamic-multicast-control",
    "feature-xdp-headroom",
    "xdp-headroom",
    "feature-split-event-channels",
    "feature-ctrl-ring",
    "mac",
    "mtu",
    "rate",
    "ip",
    "handle",
    "script",
    "bridge",
    "vifname",
    "params",
    "type",
    "mode",
    "device-type",
    "dev",
    "virtual-device",
    "physical-device",
    "hotplug-status",
    "hotplug-error",
    "sectors",
    "sector-size",
    "physical-sector-size",
    "info",
    "feature-discard",
    "discard-granularity",
    "discard-alignment",
    "discard-secure",
    "discard-enable",
    "feature-max-indirect-segments",
    "max-ring-page-order",
    "max-ring-pages",
];

/// Value of a key.
#[derive(Arbitrary, Debug)]
pub enum Text {
    /// A small number: a state, a flag, a count.
    Small(u8),
    /// The grant reference of a page, by number.
    Gref(u8),
    /// The port of a channel, by number.
    Port(u8),
    /// Any number.
    Number(u64),
    /// A value that some key has.
    Word(u8),
    /// Anything.
    Bytes(Vec<u8>),
    /// The key is removed.
    Removed,
}

/// What is rewritten, and by whom.
#[derive(Arbitrary, Debug)]
pub struct Rewrite {
    back: bool,
    key: u8,
    value: Text,
}

/// The device's domains and directories.
pub struct World {
    /// Memory, grants and events.
    pub domains: Domains,
    /// The store, with the connection of each domain.
    pub store: Rc<RefCell<Store>>,
    /// The toolstack's connection.
    pub dom0: LocalClient,
    /// The backend's connection.
    pub back: LocalClient,
    /// The frontend's connection.
    pub front: LocalClient,
    /// The device.
    pub addr: DeviceAddr,
    /// Pages that the frontend has granted, and channels that it has allocated.
    pub pages: LocalPages,
    /// Grants of these pages.
    pub grefs: Vec<GrantRef>,
    /// Channels that the backend may bind to.
    pub channels: Vec<LocalChannel>,
}

impl World {
    /// Creates the domains and a device.
    pub fn new(kind: BackendKind) -> Self {
        let domains = Domains::default();
        let store = Rc::new(RefCell::new(Store::new(Quota::default())));
        let mut dom0 = LocalClient::connect(&store, DomId::DOM0);
        for id in [BACK, FRONT] {
            create_domain(&mut dom0, id, "fuzz").expect("a new domain");
            store.borrow_mut().introduce(id);
        }
        let addr =
            DeviceAddr::new(kind, BACK, FRONT, if kind == BackendKind::Vif { 0 } else { 51712 });
        let [back, front] = [BACK, FRONT].map(|id| LocalClient::connect(&store, id));
        let pages = domains.front.alloc_pages(4).expect("enough memory");
        let grant =
            |page| domains.front.grant(BACK, &pages, page, Access::ReadWrite).expect("grants");
        let grefs = (0..4).map(grant).collect();
        let channels =
            (0..3).map(|_| domains.front.alloc_unbound(BACK).expect("enough ports")).collect();
        let mut this = Self { domains, store, dom0, back, front, addr, pages, grefs, channels };
        this.create();
        this
    }

    /// Creates the device as the toolstack does. It may exist.
    pub fn create(&mut self) {
        let (dom0, addr) = (&mut self.dom0, self.addr);
        let _ = if addr.kind == BackendKind::Vif {
            let mac = "00:16:3e:01:02:03".parse().expect("a MAC address");
            vif::create_device(dom0, addr, &vif::ToolstackBack::new(addr, mac))
        } else {
            vbd::create_device(dom0, addr, &vbd::ToolstackBack::new(addr, "disk"))
        };
    }

    /// Removes the backend's directory as the toolstack does.
    pub fn remove(&mut self) {
        let _ = remove_backend(&mut self.dom0, self.addr);
    }

    /// Rewrites a key: a directory's owner, or the toolstack for keys that the other does not own.
    pub fn rewrite(&mut self, rewrite: &Rewrite, toolstack: bool) {
        let base = if rewrite.back { self.addr.backend_path() } else { self.addr.frontend_path() };
        let path = format!("{base}/{}", KEYS[usize::from(rewrite.key) % KEYS.len()]);
        let xs = match (toolstack, rewrite.back) {
            (true, _) => &mut self.dom0,
            (false, true) => &mut self.back,
            (false, false) => &mut self.front,
        };
        const WORDS: [&str; 14] = [
            "x86_32-abi",
            "x86_64-abi",
            "arm-abi",
            "r",
            "w",
            "cdrom",
            "disk",
            "connected",
            "error",
            "yes",
            "02:00:00:00:00:01",
            "1000,50000",
            "10.0.0.1 fd00::1",
            "/etc/xen/scripts/block",
        ];
        let value = match &rewrite.value {
            Text::Small(number) => number.to_string().into_bytes(),
            Text::Gref(which) => {
                self.grefs[usize::from(*which) % self.grefs.len()].0.to_string().into_bytes()
            }
            Text::Port(which) => self.channels[usize::from(*which) % self.channels.len()]
                .port()
                .0
                .to_string()
                .into_bytes(),
            Text::Number(number) => number.to_string().into_bytes(),
            Text::Word(which) => WORDS[usize::from(*which) % WORDS.len()].into(),
            Text::Bytes(bytes) => bytes.iter().copied().take(512).collect(),
            Text::Removed => {
                let _ = xs.rm(&path);
                return;
            }
        };
        // The store may reject it.
        let _ = xs.write(&path, &value);
    }

    /// Returns the state in a directory, if it is a state.
    pub fn state(&mut self, back: bool) -> Option<XenbusState> {
        let base = if back { self.addr.backend_path() } else { self.addr.frontend_path() };
        pvio_xenbus::handshake::common::read_state(&mut self.dom0, &base).ok()
    }

    /// Asserts that the backend has released everything, and that each grant can be ended.
    pub fn assert_released(self) {
        self.domains.assert_backend_is_empty();
        for gref in self.grefs {
            assert!(self.domains.front.end_access(gref).is_ok(), "a grant is in use after the end");
        }
    }
}
