//! Guests with several queues, each a queue of the tap, in a separate network namespace.

use crate::rig::namespace::{entered, ip};
use crate::rig::{GUEST_MAC, Guest, Rig, wait_for};
use pvio_event_channel::EventChannel;
use pvio_grant_table::{DomId, Granter};
use pvio_hosted::Domain;
use pvio_netfront::{Checksum, Nic, Queue};
use pvio_ports::host::NicConfig;
use pvio_ring::proto::checksum::Transport;
use pvio_xenbus::driver::{Fault, FrontendClass, FrontendContext};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::vif::{BackOffer, EventChannels, FrontRequest, Queue as Keys};
use pvio_xenbus::{XenbusState, Xenstore};
use std::net::UdpSocket;

pub const OFFERED: u32 = 4;

/// NIC with a given number of queues.
pub struct Many {
    domain: Domain,
    count: usize,
    pub queues: Vec<Queue<Domain>>,
    /// Whether the last queue advertises an invalid ring.
    broken: bool,
}

impl Many {
    pub fn new(domain: &Domain, count: usize) -> Self {
        Self { domain: domain.clone(), count, queues: Vec::new(), broken: false }
    }
}

impl FrontendClass for Many {
    fn prepare(&mut self, xs: &mut dyn Xenstore, context: &FrontendContext) -> Result<(), Fault> {
        assert_eq!(BackOffer::read(xs, &context.back)?.queues(), OFFERED);
        let back: DomId = context.back_id;
        self.queues = (0..self.count).map(|_| Queue::new(&self.domain, back).unwrap()).collect();
        Ok(())
    }

    fn request(
        &self,
        xs: &mut dyn Xenstore,
        context: &FrontendContext,
    ) -> Result<(), HandshakeError> {
        let keys = |(n, queue): (usize, &Queue<Domain>)| Keys {
            tx_ring_ref: queue.tx_gref().0,
            rx_ring_ref: if self.broken && n + 1 == self.count { 4000 } else { queue.rx_gref().0 },
            events: EventChannels::Shared(queue.channel().port().0),
        };
        let queues = self.queues.iter().enumerate().map(keys).collect();
        FrontRequest { queues, rx_notify: true, ..FrontRequest::default() }
            .write(xs, &context.front)
    }

    fn connect(&mut self, _: &mut dyn Xenstore, _: &FrontendContext) -> Result<(), Fault> {
        self.queues.iter_mut().for_each(|queue| queue.publish().unwrap());
        Ok(())
    }

    fn disconnect(&mut self) {}

    fn release(&mut self) {}
}

fn rig() -> Rig {
    let address = Some(([192, 0, 2, 1].into(), 24));
    let max_queues = Some(OFFERED);
    let options = NicConfig { address, max_queues, ..NicConfig::default() };
    Rig::new(options, |vif| vif.vifname = Some("v0".into()))
}

/// Sends datagrams from the host in many flows until each queue has received some. The queue sends
/// replies, which the host receives.
pub fn every_queue_works(queues: &mut [Queue<Domain>]) {
    ip(&format!("neigh replace 192.0.2.2 lladdr {GUEST_MAC} dev v0")).unwrap();
    let host = UdpSocket::bind("192.0.2.1:0").unwrap();
    let mut port = 1000_u16;
    for queue in queues {
        let asked = wait_for(|| {
            host.send_to(b"question", ("192.0.2.2", port)).unwrap();
            port = port % 60_000 + 1;
            let got = queue.receive(|frame, _| frame.to_vec()).unwrap();
            queue.publish().unwrap();
            got.filter(|frame| frame.ends_with(b"question"))
        });
        // The reply: addresses and ports are exchanged.
        let mut answer = asked.clone();
        answer[..6].copy_from_slice(&asked[6..12]);
        answer[6..12].copy_from_slice(&asked[..6]);
        answer[26..30].copy_from_slice(&asked[30..34]);
        answer[30..34].copy_from_slice(&asked[26..30]);
        answer[34..36].copy_from_slice(&asked[36..38]);
        answer[36..38].copy_from_slice(&asked[34..36]);
        answer[42..50].copy_from_slice(b"answer..");
        Transport::of(&answer).unwrap().fill(&mut answer);
        queue.send(&answer, Checksum::Unknown).unwrap();
        queue.publish().unwrap();
        let mut got = [0; 8];
        let (len, from) = host.recv_from(&mut got).unwrap();
        assert_eq!((len, &got), (8, b"answer.."));
        assert_eq!(from.port().to_be_bytes(), asked[36..38]);
    }
}

#[test]
fn guest_uses_any_number_of_queues_up_to_advertised_maximum() {
    if !entered("queues::guest_uses_any_number_of_queues_up_to_advertised_maximum", &[]) {
        return;
    }
    let rig = rig();
    let (stats, domain) = (rig.all_stats(), rig.domain());
    assert_eq!(stats.len(), OFFERED as usize);
    for (count, silent) in [(3, 1), (1, 1), (4, 0), (2, 0)] {
        let mut guest = Guest::attach(&domain, rig.addr, Many::new(&domain, count));
        every_queue_works(&mut guest.driver.class_mut().queues);
        assert!(!ip("-o link show dev v0").unwrap().contains("NO-CARRIER"));
        guest.close();
        wait_for(|| ip("-o link show dev v0").filter(|l| l.contains("NO-CARRIER")));
        assert_eq!(stats.iter().filter(|s| s.tx_packets() == 0).count(), silent, "{count}");
    }
    rig.remove();
}

#[test]
fn nic_uses_all_queues_with_and_without_staged_pages() {
    if !entered("queues::nic_uses_all_queues_with_and_without_staged_pages", &[]) {
        return;
    }
    let rig = rig();
    let (stats, domain) = (rig.all_stats(), rig.domain());
    for staged in [512 * OFFERED as usize, 0] {
        let before: Vec<_> = stats.iter().map(|s| s.staged()).collect();
        let nic = Nic::new(domain.clone()).with_queues(99).splitting_channels();
        let nic = if staged == 0 { nic.without_staging() } else { nic };
        let mut guest = Guest::attach(&domain, rig.addr, nic);
        let nic = guest.driver.class_mut();
        assert_eq!(nic.queues().len(), OFFERED as usize);
        assert!(nic.queues().iter().all(|queue| queue.rx_channel().is_some()));
        // The requests for the queues are made one at a time, and sleeping queues are woken for
        // them.
        wait_for(|| (!nic.queues().is_empty() && nic.staged() == staged).then_some(()));
        every_queue_works(nic.queues());
        assert_eq!(nic.fault(), None);
        for (stats, before) in stats.iter().zip(before) {
            assert_eq!(stats.staged() > before, staged > 0);
        }
        guest.close();
        // The guest's pages are released when the backend has processed the request.
        wait_for(|| {
            guest.driver.step(&mut guest.xs).unwrap();
            guest.driver.is_closed().then_some(())
        });
    }
    rig.remove();
}

#[test]
fn failed_attach_of_one_queue_releases_all_queues() {
    if !entered("queues::failed_attach_of_one_queue_releases_all_queues", &[]) {
        return;
    }
    let mut rig = rig();
    let domain = rig.domain();
    for count in [2, 4] {
        let bad = Many { broken: true, ..Many::new(&domain, count) };
        let mut guest = Guest::start(&domain, rig.addr, bad);
        guest.until(XenbusState::Closed);
        let error = rig.error();
        assert!(error.contains("grant-bad-reference"), "{error}");
        // The kernel reports a new carrier state up to one second late.
        wait_for(|| ip("-o link show dev v0").unwrap().contains("NO-CARRIER").then_some(()));
        // No resource of any queue is in use any more.
        for queue in std::mem::take(&mut guest.driver.class_mut().queues) {
            assert!(domain.end_access(queue.tx_gref()).is_ok());
            assert!(queue.dismantle().is_ok());
        }
        let mut guest = Guest::attach(&domain, rig.addr, Many::new(&domain, count));
        every_queue_works(&mut guest.driver.class_mut().queues);
        guest.close();
    }
}
