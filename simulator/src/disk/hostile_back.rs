//! A hostile driver domain.

use crate::disk::actions::{Do, Malice};
use crate::disk::hostile_guest::{nonsense, scribble};
use pvio_event_channel::{EventChannel, EventChannels, Port};
use pvio_grant_table::{Access, GrantMapper, GrantRef};
use pvio_ring::proto::blkif::{Abi, Response, Status};
use pvio_ring::shm::Region;
use pvio_sim::local::events::LocalChannel;
use pvio_sim::local::memory::LocalMapping;
use pvio_sim::{LocalDomain, Menu, Sim};
use pvio_xenbus::handshake::common::{DeviceAddr, switch_state};
use pvio_xenbus::handshake::vbd::{BackDisk, BackOffer, Discard, DiskInfo, FrontRequest};
use pvio_xenbus::{XenbusState, Xenstore};
use pvio_xenstored::{LocalClient, Store};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::Ordering;

pub struct HostileBack {
    addr: DeviceAddr,
    domain: LocalDomain,
    xs: LocalClient,
    ring: Option<LocalMapping>,
    /// Rings of earlier sessions that are still mapped.
    kept: Vec<LocalMapping>,
    channel: Option<LocalChannel>,
}

impl HostileBack {
    pub fn start(domain: LocalDomain, store: &Rc<RefCell<Store>>, addr: DeviceAddr) -> Self {
        let xs = LocalClient::connect(store, domain.id());
        Self { addr, domain, xs, ring: None, kept: Vec::new(), channel: None }
    }

    pub fn menu(&self, menu: &mut Menu<Do>) {
        let mut may = |weight, malice| menu.may(weight, || Do::HostileBack(malice));
        may(20, Malice::Offer);
        may(20, Malice::Connect);
        may(5, Malice::Key);
        if self.ring.is_some() {
            may(100, Malice::Answer);
            may(20, Malice::Scribble);
            may(2, Malice::Detach);
            may(100, Malice::Notify);
        }
    }

    pub fn act(&mut self, malice: &Malice, sim: &mut Sim) {
        let base = self.addr.backend_path();
        let offer = BackOffer {
            flush: sim.one_in(2),
            discard: sim.one_in(2).then(Discard::default),
            ..BackOffer::default()
        };
        // Operations that xenstore rejects have no effect.
        match malice {
            Malice::Offer => {
                let _ = offer.write(&mut self.xs, &base);
                let _ = switch_state(&mut self.xs, &base, XenbusState::InitWait);
            }
            Malice::Connect => self.connect(&offer, sim),
            Malice::Answer => self.answer(sim),
            Malice::Scribble => {
                scribble(self.ring.as_ref().expect("action is available only then"), sim)
            }
            Malice::Key => {
                let keys = [
                    "state",
                    "state",
                    "online",
                    "sectors",
                    "sector-size",
                    "info",
                    "feature-discard",
                ];
                let (path, value) = (format!("{base}/{}", sim.pick(&keys)), nonsense(sim));
                let _ = self.xs.write(&path, &value);
            }
            Malice::Detach => {
                (self.ring, self.channel) = (None, None);
                self.kept.clear();
            }
            Malice::Notify => {
                if let Some(channel) = &self.channel {
                    channel.notify().expect("the domain is alive");
                }
            }
        }
    }

    fn connect(&mut self, offer: &BackOffer, sim: &mut Sim) {
        let (front, base) = (self.addr.front, self.addr.backend_path());
        let disk = BackDisk {
            sectors: sim.pick(&[256, 256, 256, 1, 0, 1 << 50]),
            info: DiskInfo::default(),
            sector_size: sim.pick(&[512, 512, 4096, 65536]),
            physical_sector_size: 65536,
            offer: offer.clone(),
        };
        if let Ok(request) = FrontRequest::read(&mut self.xs, &self.addr.frontend_path(), offer) {
            let queue = &request.queues[0];
            let grefs = [GrantRef(queue.ring_refs[0])];
            if let Ok(ring) = self.domain.map(front, &grefs, Access::ReadWrite) {
                let last = self.ring.replace(ring);
                self.kept.extend(last.filter(|_| !sim.one_in(4)));
                self.channel = self.domain.bind_interdomain(front, Port(queue.event_channel)).ok();
            }
        }
        let _ = disk.write(&mut self.xs, &base);
        let _ = switch_state(&mut self.xs, &base, XenbusState::Connected);
    }

    fn answer(&mut self, sim: &mut Sim) {
        let ring = self.ring.as_ref().expect("action is available only then");
        let word = |at| ring.load_u32(at, Ordering::Acquire).expect("inside the page");
        let (asked, answered) = (word(0), word(8));
        let count = asked.wrapping_sub(answered).min(4);
        for n in 0..count {
            let at = 64 + (answered.wrapping_add(n) % 32) as usize * Abi::X86_64.slot_size();
            // Usually the id of the request in that slot: in order, that is the correct one.
            let mut id = [0; 8];
            ring.read_words(at + 8, &mut id).expect("inside the page");
            let id = if sim.one_in(50) { sim.below(40) } else { u64::from_le_bytes(id) };
            let status = sim.pick(&[Status::Okay, Status::Error, Status::NotSupported]);
            let mut bytes = [0; 16];
            let response =
                Response { id, op: sim.number() as u8, status }.write(Abi::X86_64, &mut bytes);
            ring.write_words(at, response).expect("inside the page");
        }
        let beyond = if sim.one_in(100) { sim.number() as u32 } else { 0 };
        ring.store_u32(8, answered.wrapping_add(count).wrapping_add(beyond), Ordering::Release);
    }
}
