//! Workers, and threads that they depend on, that end on their own: the device closes with a
//! reason.

use crate::rig::namespace::{entered, ip};
use crate::rig::{Rig, wait_for};
use pvio_event_channel::{EventChannels, EventError, Port};
use pvio_grant_table::{Access, CopyOp, DomId, GrantCopier, GrantMapper, GrantRef, GrantStatus};
use pvio_hosted::Domain;
use pvio_netback::port::NetPort;
use pvio_netfront::Checksum;
use pvio_ports::afxdp::AfXdpPort;
use pvio_ports::file::FilePort;
use pvio_ports::host::{NicConfig, NicSettings};
use pvio_ports::switch::SwitchPort;
use pvio_ports::tap::{Tap, TapConfig, TapPort};
use pvio_runtime::PrivateBuf;
use pvio_xenbus::handshake::common::read_state;
use pvio_xenbus::{XenbusState, handshake::vif::ToolstackBack};
use std::sync::Arc;
use std::time::Duration;

/// Platform whose copies panic.
#[derive(Clone)]
struct Panicky(Domain);

impl GrantMapper for Panicky {
    type Mapping = <Domain as GrantMapper>::Mapping;

    fn map(
        &self,
        domain: DomId,
        grefs: &[GrantRef],
        access: Access,
    ) -> Result<Self::Mapping, GrantStatus> {
        self.0.map(domain, grefs, access)
    }
}

impl GrantCopier for Panicky {
    fn copy(&self, ops: &mut [CopyOp<'_>]) {
        assert!(ops.is_empty(), "injected panic in the worker");
    }
}

impl EventChannels for Panicky {
    type Channel = <Domain as EventChannels>::Channel;

    fn alloc_unbound(&self, remote: DomId) -> Result<Self::Channel, EventError> {
        self.0.alloc_unbound(remote)
    }

    fn bind_interdomain(&self, remote: DomId, port: Port) -> Result<Self::Channel, EventError> {
        self.0.bind_interdomain(remote, port)
    }
}

fn options(words: &str) -> impl FnOnce(&mut ToolstackBack) {
    let words = words.to_owned();
    move |vif| vif.options = Some(words)
}

/// Checks that the device is closed, and that its error node has this code.
fn assert_closed(rig: &mut Rig, code: &str) {
    let why = rig.error();
    assert!(why.contains(code), "{why}");
    let back = rig.addr.backend_path();
    wait_for(|| {
        let state = read_state(&mut rig.tools, &back).unwrap();
        (state == XenbusState::Closed).then_some(())
    });
}

#[test]
fn panicked_worker_closes_device_with_reason() {
    let mut rig = Rig::on(Panicky, NicConfig::default(), Arc::default(), options("loopback"));
    let mut guest = rig.guest();
    let queue = guest.driver.class_mut().queue().unwrap();
    queue.send(&[2; 60], Checksum::Unknown).unwrap();
    queue.publish().unwrap();
    assert_closed(&mut rig, "worker-panicked");
}

#[test]
fn removed_uplink_closes_nics_of_its_switch_with_reason() {
    let name = "broken::removed_uplink_closes_nics_of_its_switch_with_reason";
    if !entered(name, &[]) {
        return;
    }
    let mut shared = NicSettings::default();
    shared.switches.set_uplink("lan", TapConfig::new("up0"));
    let shared = Arc::new(shared);
    let nic = || Rig::within(NicConfig::default(), Arc::clone(&shared), options("switch=lan"));
    let mut rig = nic();
    let _guest = rig.guest();
    ip("link del up0").expect("delete the interface of the uplink");
    assert_closed(&mut rig, "tap-lost");
    // A NIC that is attached now gets a new uplink.
    let again = nic();
    let _guest = again.guest();
    assert!(ip("link show up0").is_some());
}

#[test]
fn tap_still_held_by_exiting_process_is_waited_for() {
    let name = "broken::tap_still_held_by_exiting_process_is_waited_for";
    if !entered(name, &[]) {
        return;
    }
    let tap = Tap::create(&TapConfig::new("v0")).unwrap();
    let released = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        drop(tap);
    });
    let rig = Rig::new(NicConfig::default(), |vif| vif.vifname = Some("v0".into()));
    let _guest = rig.guest();
    released.join().unwrap();
}

/// After the end of a process, the kernel may still access memory of this type, which is not shared
/// with a guest. A port that did I/O with other memory would not compile here.
#[test]
fn ports_do_io_only_with_private_memory() {
    fn private<N: NetPort<Buf = PrivateBuf>>() {}
    private::<TapPort>();
    private::<AfXdpPort>();
    private::<SwitchPort>();
    private::<FilePort>();
}
