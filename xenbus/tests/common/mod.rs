//! Two domains and a device between them, with a store in this thread.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::cell::RefCell;
use std::rc::Rc;

use pvio_ring::DomId;
use pvio_xenbus::Xenstore;
use pvio_xenbus::handshake::common::{self as dev, BackendKind, DeviceAddr};
use pvio_xenbus::handshake::{vbd, vif};
use pvio_xenstored::{LocalClient, Store};

pub const BACK: DomId = DomId(2);
pub const FRONT: DomId = DomId(5);

pub struct World {
    pub store: Rc<RefCell<Store>>,
    pub dom0: LocalClient,
    pub back: LocalClient,
    pub front: LocalClient,
}

pub fn world() -> World {
    let store = Rc::new(RefCell::new(Store::default()));
    let mut dom0 = LocalClient::connect(&store, DomId::DOM0);
    for domid in [BACK, FRONT] {
        dev::create_domain(&mut dom0, domid, "domain").unwrap();
        store.borrow_mut().introduce(domid);
    }
    let back = LocalClient::connect(&store, BACK);
    let front = LocalClient::connect(&store, FRONT);
    World { store, dom0, back, front }
}

pub fn disk() -> (World, String, String) {
    let mut w = world();
    let addr = DeviceAddr::new(BackendKind::Vbd, BACK, FRONT, 51712);
    vbd::create_device(&mut w.dom0, addr, &vbd::ToolstackBack::new(addr, "/srv/disk.img")).unwrap();
    (w, addr.backend_path(), addr.frontend_path())
}

pub fn nic() -> (World, String, String) {
    let mut w = world();
    let addr = DeviceAddr::new(BackendKind::Vif, BACK, FRONT, 0);
    let mac = "00:16:3e:01:02:03".parse().unwrap();
    vif::create_device(&mut w.dom0, addr, &vif::ToolstackBack::new(addr, mac)).unwrap();
    (w, addr.backend_path(), addr.frontend_path())
}

pub fn put(xs: &mut LocalClient, base: &str, keys: &[(&str, &str)]) {
    for (key, value) in keys {
        xs.write(&format!("{base}/{key}"), value.as_bytes()).unwrap();
    }
}

/// Returns the offer of a disk's backend with all features.
pub fn offer() -> vbd::BackOffer {
    vbd::BackOffer {
        max_indirect_segments: Some(256),
        max_queues: Some(4),
        max_ring_page_order: Some(4),
        max_ring_pages: Some(16),
        persistent: true,
        flush: true,
        barrier: false,
        discard: Some(vbd::Discard { granularity: Some(4096), alignment: Some(0), secure: true }),
    }
}

/// Returns a queue whose ring is granted from reference `first` on.
pub fn queue(first: u32, pages: u32) -> vbd::Queue {
    vbd::Queue { ring_refs: (first..first + pages).collect(), event_channel: first }
}

/// Takes and drops all queued events.
pub fn discard_events(xs: &mut LocalClient) {
    while xs.poll_event().unwrap().is_some() {}
}
