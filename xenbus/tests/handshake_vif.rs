//! The handshake of a network interface: each struct is read as it was written, and each invalid
//! value is rejected with the name of its key.
#![cfg(feature = "std")]

mod common;

use common::{BACK, FRONT, nic, put, world};
use pvio_xenbus::Xenstore;
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr};
use pvio_xenbus::handshake::{HandshakeError, vif};

fn net_offer() -> vif::BackOffer {
    vif::BackOffer {
        max_queues: Some(3),
        rx_copy: true,
        rx_flip: false,
        sg: true,
        gso_tcpv4: true,
        gso_tcpv6: true,
        gso_tcpv4_prefix: false,
        gso_tcpv6_prefix: false,
        no_csum_offload: false,
        ipv6_csum_offload: true,
        multicast_control: true,
        dynamic_multicast_control: true,
        split_event_channels: true,
        ctrl_ring: true,
        xdp_headroom: true,
    }
}

fn net_queue(first: u32) -> vif::Queue {
    vif::Queue {
        tx_ring_ref: first,
        rx_ring_ref: first + 1,
        events: vif::EventChannels::Split { tx: first, rx: first + 1 },
    }
}

fn net_request() -> vif::FrontRequest {
    vif::FrontRequest {
        queues: vec![net_queue(10), net_queue(20), net_queue(30)],
        ctrl: Some(vif::ControlRing { ring_ref: 40, event_channel: 41 }),
        rx_notify: true,
        sg: true,
        gso_tcpv4: true,
        gso_tcpv6: true,
        ipv6_csum_offload: true,
        multicast_control: true,
        xdp_headroom: 256,
        ..vif::FrontRequest::default()
    }
}

#[test]
fn vif_handshake_negotiates_features_and_replaces_old_keys() {
    let mut w = world();
    let addr = DeviceAddr::new(BackendKind::Vif, BACK, FRONT, 1);
    let keys = vif::ToolstackBack {
        mtu: Some(9000),
        bridge: Some("xenbr0".into()),
        script: Some("/etc/xen/scripts/vif-bridge".into()),
        vifname: Some("tap5".into()),
        kind: Some("vif".into()),
        rate: Some(vif::VifRate { bytes: 1 << 40, usec: 50_000 }),
        ..vif::ToolstackBack::new(addr, "00:16:3e:01:02:03".parse().unwrap())
    };
    vif::create_device(&mut w.dom0, addr, &keys).unwrap();
    let (back, front) = (addr.backend_path(), addr.frontend_path());
    assert_eq!(vif::ToolstackBack::read(&mut w.back, &back).unwrap(), keys);
    let front_keys = vif::ToolstackFront::read(&mut w.front, &front).unwrap();
    assert_eq!((front_keys.mtu, front_keys.mac, front_keys.handle), (Some(9000), keys.mac, 1));
    assert_eq!((front_keys.backend.as_str(), front_keys.backend_id), (back.as_str(), BACK));

    net_offer().write(&mut w.back, &back).unwrap();
    assert_eq!(vif::BackOffer::read(&mut w.front, &back).unwrap(), net_offer());
    assert_eq!(net_offer().plan(vif::FrontLimits { max_queues: 8 }), 3);
    net_request().write(&mut w.front, &front).unwrap();
    assert_eq!(vif::FrontRequest::read(&mut w.back, &front, &net_offer()).unwrap(), net_request());
    let agreed = vif::Negotiated::new(&net_offer(), &net_request());
    let all = vif::Offloads { sg: true, csum_v4: true, csum_v6: true, gso_v4: true, gso_v6: true };
    assert_eq!((agreed.to_back, agreed.to_front), (all, all));
    assert_eq!((agreed.queues, agreed.split_event_channels, agreed.ctrl_ring), (3, true, true));
    assert!(agreed.multicast_control && agreed.dynamic_multicast && agreed.rx_notify);
    assert_eq!(agreed.xdp_headroom, 256);

    let simple = vif::FrontRequest {
        queues: vec![vif::Queue {
            tx_ring_ref: 8,
            rx_ring_ref: 9,
            events: vif::EventChannels::Shared(3),
        }],
        ..vif::FrontRequest::default()
    };
    simple.write(&mut w.front, &front).unwrap();
    assert_eq!(
        vif::FrontRequest::read(&mut w.back, &front, &vif::BackOffer::default()).unwrap(),
        simple
    );
    let mut keys = w.front.directory(&front).unwrap();
    keys.retain(|k| {
        k.contains("ring") || k.contains("queue") || k.contains("channel") || k.contains("xdp")
    });
    assert_eq!(keys, ["event-channel", "rx-ring-ref", "tx-ring-ref"]);
    assert!(vif::multicast_request_path(&front).starts_with(&front));
    assert!(!vif::read_multicast_request(&mut w.back, &front).unwrap());
    w.store.borrow().check().unwrap();
}

#[test]
fn vif_offload_keys_are_negotiated_per_direction() {
    // Without any keys, checksums over IPv4 may be blank, and nothing else.
    let least = vif::Negotiated::new(&vif::BackOffer::default(), &vif::FrontRequest::default());
    let v4 = vif::Offloads { csum_v4: true, ..vif::Offloads::default() };
    assert_eq!((least.to_back, least.to_front), (v4, v4));
    // The frontend may still send what it refuses to receive.
    let iperf_on_openbsd = vif::FrontRequest { no_csum_offload: true, ..net_request() };
    let agreed = vif::Negotiated::new(&net_offer(), &iperf_on_openbsd);
    assert!(!agreed.to_front.csum_v4 && !agreed.to_front.gso_v4 && agreed.to_front.gso_v6);
    assert!(agreed.to_back.csum_v4 && agreed.to_back.gso_v4);
    // GSO requires several slots and blank checksums.
    let single_slot =
        vif::Negotiated::new(&net_offer(), &vif::FrontRequest { sg: false, ..net_request() });
    assert!(
        !single_slot.to_front.gso_v4 && !single_slot.to_front.gso_v6 && single_slot.to_back.gso_v4
    );
    let v6_strict = vif::Negotiated::new(
        &vif::BackOffer { ipv6_csum_offload: false, ..net_offer() },
        &net_request(),
    );
    assert!(!v6_strict.to_back.gso_v6 && !v6_strict.to_front.csum_v6 && v6_strict.to_back.gso_v4);
    let unasked = vif::BackOffer { multicast_control: false, xdp_headroom: false, ..net_offer() };
    let agreed = vif::Negotiated::new(&unasked, &net_request());
    assert!(!agreed.multicast_control && !agreed.dynamic_multicast && agreed.xdp_headroom == 0);
}

#[test]
fn gso_prefix_is_negotiated_only_without_gso() {
    let (sg, gso_tcpv4_prefix, gso_tcpv6_prefix) = (true, true, true);
    let old = vif::FrontRequest { sg, gso_tcpv4_prefix, gso_tcpv6_prefix, ..Default::default() };
    let form = |request| {
        let agreed = vif::Negotiated::new(&net_offer(), &request);
        (agreed.gso_prefix_v4, agreed.gso_prefix_v6)
    };
    assert_eq!(form(old.clone()), (true, false), "over IPv6 no checksum may be blank");
    assert_eq!(form(vif::FrontRequest { ipv6_csum_offload: true, ..old.clone() }), (true, true));
    assert_eq!(form(vif::FrontRequest { gso_tcpv4: true, ..old.clone() }), (false, false));
    assert_eq!(form(vif::FrontRequest { sg: false, ..old.clone() }), (false, false));
    assert_eq!(form(vif::FrontRequest { no_csum_offload: true, ..old }), (false, false));
    assert_eq!(form(net_request()), (false, false));
}

#[test]
fn malformed_vif_request_is_rejected_naming_key() {
    let good = [
        ("tx-ring-ref", "8"),
        ("rx-ring-ref", "9"),
        ("event-channel", "3"),
        ("request-rx-copy", "1"),
    ];
    let cases: &[(&[(&str, &str)], &str)] = &[
        (
            &[("request-rx-copy", "0")],
            "`request-rx-copy` is \"0\", expected 1, since only copies are served",
        ),
        (&[("rx-ring-ref", "8")], "`rx-ring-ref` is 8, which is in use for another ring"),
        (&[("tx-ring-ref", "q")], "`tx-ring-ref` is \"q\", expected a decimal number"),
        (&[("event-channel", "0")], "`event-channel` is 0, expected 1 to 4294967295"),
        (&[("event-channel-tx", "4")], "`event-channel-tx` uses a feature that was not advertised"),
        (&[("ctrl-ring-ref", "4")], "`ctrl-ring-ref` uses a feature that was not advertised"),
        (&[("multi-queue-num-queues", "0")], "`multi-queue-num-queues` is 0, expected 1 to 1"),
        (&[("multi-queue-num-queues", "2")], "`multi-queue-num-queues` is 2, expected 1 to 1"),
        (&[("xdp-headroom", "32768")], "`xdp-headroom` is 32768, expected 0 to 32767"),
        (&[("feature-sg", "on")], "`feature-sg` is \"on\", expected a decimal number"),
    ];
    for (keys, expected) in cases {
        let (mut w, _back, front) = nic();
        put(&mut w.front, &front, &good);
        put(&mut w.front, &front, keys);
        let error =
            vif::FrontRequest::read(&mut w.back, &front, &vif::BackOffer::default()).unwrap_err();
        assert_eq!(error.to_string().replace(&format!("{front}/"), ""), *expected);
    }
    let (mut w, back, front) = nic();
    let error = vif::FrontRequest::read(&mut w.back, &front, &net_offer()).unwrap_err();
    assert!(error.to_string().contains("request-rx-copy"));
    net_request().write(&mut w.front, &front).unwrap();
    w.front.rm(&format!("{front}/queue-2/event-channel-rx")).unwrap();
    let error = vif::FrontRequest::read(&mut w.back, &front, &net_offer()).unwrap_err();
    assert_eq!(
        error,
        HandshakeError::Missing { path: format!("{front}/queue-2/event-channel-rx").into() }
    );
    let none = vif::FrontRequest::default().write(&mut w.front, &front);
    assert!(matches!(none, Err(HandshakeError::Unwritable(_))));

    for rate in [
        "",
        "1",
        "1,",
        ",1",
        "0,1",
        "1,0",
        "1,2,3",
        "-1,5",
        "99999999999999999999,1",
        "5,4294967296",
    ] {
        put(&mut w.dom0, &back, &[("rate", rate)]);
        assert!(vif::read_rate(&mut w.back, &back).is_err(), "{rate}");
    }
    put(&mut w.dom0, &back, &[("rate", "12500000,50000")]);
    let rate = vif::read_rate(&mut w.back, &back).unwrap();
    assert_eq!(rate, Some(vif::VifRate { bytes: 12_500_000, usec: 50_000 }));
    w.dom0.rm(&vif::rate_path(&back)).unwrap();
    assert_eq!(vif::read_rate(&mut w.back, &back).unwrap(), None);
    for (key, value) in [
        ("mac", "00:16:3e"),
        ("mac", "ff:ff:ff:ff:ff:ff"),
        ("mtu", "67"),
        ("mtu", "65536"),
        ("handle", "x"),
    ] {
        let (mut w, back, _front) = nic();
        put(&mut w.dom0, &back, &[(key, value)]);
        let error = vif::ToolstackBack::read(&mut w.back, &back).unwrap_err().to_string();
        assert!(error.contains(&format!("{back}/{key}`")), "{key}={value}: {error}");
    }
}
