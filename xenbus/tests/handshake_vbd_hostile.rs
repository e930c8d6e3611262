//! The handshake of a disk with a hostile peer: each invalid value is rejected with the name of its
//! key.
#![cfg(feature = "std")]

mod common;

use common::{disk, offer, put, queue};
use proptest::prelude::*;
use pvio_xenbus::Xenstore;
use pvio_xenbus::handshake::{HandshakeError, vbd, vif};

#[test]
fn malformed_vbd_request_is_rejected_naming_key() {
    let good = [("ring-ref", "8"), ("event-channel", "3")];
    let cases: &[(&[(&str, &str)], &str)] = &[
        (&[("ring-ref", "")], "`ring-ref` is \"\", expected a decimal number"),
        (&[("ring-ref", "-1")], "`ring-ref` is \"-1\", expected a decimal number"),
        (&[("ring-ref", "0x10")], "`ring-ref` is \"0x10\", expected a decimal number"),
        (&[("ring-ref", "4294967296")], "`ring-ref` is 4294967296, expected 0 to 4294967295"),
        (&[("event-channel", "0")], "`event-channel` is 0, expected 1 to 4294967295"),
        (
            &[("event-channel", "\u{1b}[2J")],
            "`event-channel` is \"\\x1b[2J\", expected a decimal number",
        ),
        (
            &[("protocol", "sparc")],
            "`protocol` is \"sparc\", expected x86_32-abi, x86_64-abi or arm-abi",
        ),
        (&[("protocol", "")], "`protocol` is \"\", expected x86_32-abi, x86_64-abi or arm-abi"),
        (
            &[("feature-persistent", "yes")],
            "`feature-persistent` is \"yes\", expected a decimal number",
        ),
        (&[("ring-page-order", "5")], "`ring-page-order` is 5, expected 0 to 4"),
        (&[("ring-page-order", "1")], "`ring-ref0` is missing"),
        (&[("num-ring-pages", "0")], "`num-ring-pages` is 0, expected 1 to 16"),
        (&[("num-ring-pages", "3")], "`num-ring-pages` is \"3\", expected a power of two"),
        (&[("num-ring-pages", "17")], "`num-ring-pages` is 17, expected 1 to 16"),
        (&[("multi-queue-num-queues", "0")], "`multi-queue-num-queues` is 0, expected 1 to 4"),
        (&[("multi-queue-num-queues", "5")], "`multi-queue-num-queues` is 5, expected 1 to 4"),
        (&[("multi-queue-num-queues", "2")], "`queue-0/ring-ref` is missing"),
        (
            &[("ring-page-order", "1"), ("ring-ref0", "7"), ("ring-ref1", "7")],
            "`ring-ref1` is 7, which is in use for another ring",
        ),
    ];
    for (keys, expected) in cases {
        let (mut w, _back, front) = disk();
        put(&mut w.front, &front, &good);
        put(&mut w.front, &front, keys);
        let error = vbd::FrontRequest::read(&mut w.back, &front, &offer()).unwrap_err();
        assert_eq!(error.to_string().replace(&format!("{front}/"), ""), *expected);
    }
    let (mut w, _back, front) = disk();
    let error = vbd::FrontRequest::read(&mut w.back, &front, &offer()).unwrap_err();
    assert_eq!(error, HandshakeError::Missing { path: format!("{front}/ring-ref").into() });
    let two = vbd::FrontRequest {
        protocol: None,
        persistent: false,
        queues: vec![queue(8, 1), queue(8, 1)],
    };
    two.write(&mut w.front, &front).unwrap();
    let error = vbd::FrontRequest::read(&mut w.back, &front, &offer()).unwrap_err();
    assert!(
        matches!(error, HandshakeError::Duplicate { ref path, value: 8 } if path.ends_with("queue-1/ring-ref"))
    );
    for bad in [vec![], vec![queue(8, 3)], vec![queue(8, 1), queue(9, 2)]] {
        let request = vbd::FrontRequest { queues: bad, ..two.clone() };
        assert!(matches!(request.write(&mut w.front, &front), Err(HandshakeError::Unwritable(_))));
    }
    // The frontend denies the backend permission to a key: it counts as missing, so there is one
    // queue.
    let secret = [pvio_xenbus::wire::Perm::parse(b"n5").unwrap()];
    w.front.set_perms(&format!("{front}/multi-queue-num-queues"), &secret).unwrap();
    let error = vbd::FrontRequest::read(&mut w.back, &front, &offer()).unwrap_err();
    assert_eq!(error, HandshakeError::Missing { path: format!("{front}/ring-ref").into() });
}

#[test]
fn malformed_vbd_keys_of_backend_or_toolstack_are_rejected() {
    let (mut w, back, front) = disk();
    let whole = vbd::BackDisk {
        sectors: 8,
        info: vbd::DiskInfo::from_bits(0xff),
        sector_size: 512,
        physical_sector_size: 512,
        offer: offer(),
    };
    assert_eq!(whole.info.bits(), 7);
    for (key, value) in [
        ("sectors", "36028797018963968"),
        ("sectors", "x"),
        ("sector-size", "0"),
        ("sector-size", "513"),
        ("sector-size", "131072"),
        ("physical-sector-size", "256"),
        ("info", "99999999999"),
        ("multi-queue-max-queues", "0"),
        ("max-ring-pages", "0"),
        ("feature-discard", "maybe"),
    ] {
        whole.write(&mut w.back, &back).unwrap();
        put(&mut w.back, &back, &[(key, value)]);
        let error = vbd::BackDisk::read(&mut w.front, &back).unwrap_err().to_string();
        assert!(error.contains(&format!("{back}/{key}`")), "{key}={value}: {error}");
    }
    for bad in [
        vbd::BackDisk { sectors: 1 << 55, ..whole.clone() },
        vbd::BackDisk { sector_size: 520, ..whole.clone() },
        vbd::BackDisk { sector_size: 4096, ..whole.clone() },
    ] {
        assert!(matches!(bad.write(&mut w.back, &back), Err(HandshakeError::Unwritable(_))));
    }
    assert!(vbd::announce_resize(&mut w.back, &back, 1 << 55).is_err());

    // A frontend can write its own directory: its keys must not lead to a third domain.
    put(&mut w.front, &front, &[("backend", "/local/domain/7/backend/vbd/5/51712")]);
    let error = vbd::ToolstackFront::read(&mut w.front, &front).unwrap_err();
    assert!(error.to_string().contains("expected a path below the peer's home"));
    for (key, value) in [
        ("mode", "rw"),
        ("frontend-id", "32752"),
        ("frontend", "/local/domain/55/x"),
        ("frontend", "/local/domain/5/../6"),
        ("device-type", "tape"),
        ("params", "a\0b"),
        ("online", "on"),
    ] {
        let (mut w, back, _front) = disk();
        put(&mut w.dom0, &back, &[(key, value)]);
        let error = vbd::ToolstackBack::read(&mut w.back, &back).unwrap_err().to_string();
        assert!(error.contains(&format!("{back}/{key}`")), "{key}={value}: {error}");
    }
}

proptest! {
    /// Whatever a frontend writes into its directory, the read returns an error or a request within
    /// the offer.
    #[test]
    fn random_frontend_keys_yield_error_or_request_within_offer(keys in proptest::collection::vec((
        proptest::sample::select(&["ring-ref", "ring-ref0", "ring-ref1", "ring-page-order", "num-ring-pages", "event-channel",
            "protocol", "feature-persistent", "multi-queue-num-queues", "queue-0/ring-ref", "queue-0/event-channel",
            "queue-1/ring-ref", "queue-1/event-channel", "tx-ring-ref", "rx-ring-ref", "request-rx-copy", "event-channel-tx",
            "event-channel-rx", "ctrl-ring-ref", "xdp-headroom"][..]),
        prop_oneof![
            4 => (0_u64..20).prop_map(|n| n.to_string().into_bytes()),
            1 => any::<u64>().prop_map(|n| n.to_string().into_bytes()),
            1 => proptest::collection::vec(any::<u8>(), 0..20),
        ]), 0..30))
    {
        let (mut w, _back, front) = disk();
        for (key, value) in &keys {
            w.front.write(&format!("{front}/{key}"), value).unwrap();
        }
        if let Ok(request) = vbd::FrontRequest::read(&mut w.back, &front, &offer()) {
            prop_assert!((1..=4).contains(&request.queues.len()));
            prop_assert!(request.ring_pages().is_power_of_two() && request.ring_pages() <= 16);
            prop_assert!(request.queues.iter().all(|q| q.event_channel != 0 && q.ring_refs.len() == request.ring_pages()));
            prop_assert!(vbd::Negotiated::new(&offer(), &request).queues <= 4);
            request.write(&mut w.front, &front).unwrap();
            prop_assert_eq!(vbd::FrontRequest::read(&mut w.back, &front, &offer()).unwrap(), request);
        }
        let offer = vif::BackOffer { max_queues: Some(2), ..vif::BackOffer::default() };
        if let Ok(request) = vif::FrontRequest::read(&mut w.back, &front, &offer) {
            prop_assert!((1..=2).contains(&request.queues.len()) && request.ctrl.is_none());
            prop_assert!(vif::Negotiated::new(&offer, &request).queues <= 2);
        }
    }
}
