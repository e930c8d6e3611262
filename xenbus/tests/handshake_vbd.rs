//! The handshake of a disk: each struct is read as it was written, and the requests of known
//! frontends are parsed.
#![cfg(feature = "std")]

mod common;

use common::{disk, offer, put, queue};
use pvio_xenbus::handshake::common as dev;
use pvio_xenbus::handshake::vbd;
use pvio_xenbus::{XenbusState, Xenstore, transaction};

/// The keys that a frontend writes.
type Keys<'a> = &'a [(&'a str, &'a str)];

#[test]
fn vbd_handshake_negotiates_features_and_replaces_old_keys() {
    let (mut w, back, front) = disk();
    transaction(&mut w.back, |tx| {
        offer().write(tx, &back)?;
        dev::write_state(tx, &back, XenbusState::InitWait)
    })
    .unwrap();
    let offered = vbd::BackOffer::read(&mut w.front, &back).unwrap();
    assert_eq!(offered, offer());
    let plan = offered.plan(vbd::FrontLimits { max_queues: 2, max_ring_page_order: 9 });
    assert_eq!(plan, vbd::FrontPlan { queues: 2, ring_page_order: 4 });

    let request = vbd::FrontRequest {
        protocol: Some(vbd::Protocol::X86_64),
        persistent: true,
        queues: vec![queue(100, 16), queue(200, 16)],
    };
    request.write(&mut w.front, &front).unwrap();
    assert_eq!(vbd::FrontRequest::read(&mut w.back, &front, &offer()).unwrap(), request);
    let agreed = vbd::Negotiated::new(&offer(), &request);
    assert_eq!((agreed.queues, agreed.ring_pages, agreed.persistent), (2, 16, true));
    assert_eq!((agreed.max_indirect_segments, agreed.flush, agreed.barrier), (256, true, false));
    assert_eq!(agreed.discard, offer().discard);

    // The same frontend submits a simpler request: no key of the old one may be left.
    let simple = vbd::FrontRequest { protocol: None, persistent: true, queues: vec![queue(8, 1)] };
    simple.write(&mut w.front, &front).unwrap();
    let mut keys = w.front.directory(&front).unwrap();
    keys.retain(|k| {
        k.contains("ring") || k.contains("queue") || k.contains("channel") || k == "protocol"
    });
    assert_eq!(keys, ["event-channel", "ring-ref"]);
    assert_eq!(vbd::FrontRequest::read(&mut w.back, &front, &offer()).unwrap(), simple);
    let bare = vbd::BackOffer::default();
    assert_eq!(vbd::FrontRequest::read(&mut w.back, &front, &bare).unwrap(), simple);
    assert!(!vbd::Negotiated::new(&bare, &simple).persistent, "requested but not advertised");

    let disk = vbd::BackDisk {
        sectors: 1 << 40,
        info: vbd::DiskInfo { read_only: true, ..vbd::DiskInfo::default() },
        sector_size: 4096,
        physical_sector_size: 16384,
        offer: vbd::BackOffer { flush: false, discard: None, ..offer() },
    };
    disk.write(&mut w.back, &back).unwrap();
    assert_eq!(vbd::BackDisk::read(&mut w.front, &back).unwrap(), disk);
    w.front.watch(&dev::state_path(&back), "state").unwrap();
    common::discard_events(&mut w.front);
    dev::write_state(&mut w.back, &back, XenbusState::Connected).unwrap();
    common::discard_events(&mut w.front);
    vbd::announce_resize(&mut w.back, &back, 77).unwrap();
    assert!(w.front.poll_event().unwrap().is_some());
    assert_eq!(
        vbd::BackDisk::read(&mut w.front, &back).unwrap(),
        vbd::BackDisk { sectors: 77, ..disk }
    );
    w.store.borrow().check().unwrap();
}

/// The requests of known frontends, each as its keys, and the request that must be read from it.
#[test]
fn vbd_request_of_known_frontends_is_read() {
    let event = ("event-channel", "3");
    let refs4 =
        [("ring-ref0", "10"), ("ring-ref1", "11"), ("ring-ref2", "12"), ("ring-ref3", "13")];
    let cases: &[(&str, Keys<'_>, &[u32])] = &[
        (
            "Linux, one page",
            &[("ring-ref", "8"), event, ("protocol", "x86_64-abi"), ("feature-persistent", "1")],
            &[8],
        ),
        ("Linux, order 0", &[("ring-ref0", "9"), ("ring-page-order", "0"), event], &[9]),
        ("order 0 with the plain key", &[("ring-ref", "8"), ("ring-page-order", "0"), event], &[8]),
        (
            "both keys and order 0",
            &[("ring-ref", "8"), ("ring-ref0", "9"), ("ring-page-order", "0"), event],
            &[9],
        ),
        ("both keys and no order", &[("ring-ref", "8"), ("ring-ref0", "9"), event], &[8]),
        (
            "Linux, order 2",
            &[refs4[0], refs4[1], refs4[2], refs4[3], ("ring-page-order", "2"), event],
            &[10, 11, 12, 13],
        ),
        (
            "FreeBSD, both",
            &[
                refs4[0],
                refs4[1],
                refs4[2],
                refs4[3],
                ("ring-page-order", "2"),
                ("num-ring-pages", "4"),
                event,
            ],
            &[10, 11, 12, 13],
        ),
        ("old FreeBSD", &[refs4[0], refs4[1], ("num-ring-pages", "2"), event], &[10, 11]),
        ("num-ring-pages of 1", &[("ring-ref", "8"), ("num-ring-pages", "1"), event], &[8]),
        (
            "a Windows crash dump",
            &[
                ("ring-ref", "8"),
                ("multi-queue-num-queues", "1"),
                ("protocol", "x86_64-abi"),
                event,
            ],
            &[8],
        ),
        ("GRUB on 32 bits", &[("ring-ref", "8"), event, ("protocol", "x86_32-abi")], &[8]),
        ("values that end in NUL", &[("ring-ref", "8\0"), ("event-channel", "3\n")], &[8]),
    ];
    for (name, keys, refs) in cases {
        let (mut w, _back, front) = disk();
        put(&mut w.front, &front, keys);
        let request = vbd::FrontRequest::read(&mut w.back, &front, &offer())
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(request.queues.len(), 1, "{name}");
        assert_eq!(request.queues[0].ring_refs, *refs, "{name}");
        assert_eq!(request.queues[0].event_channel, 3, "{name}");
    }
}

#[test]
fn vbd_offer_with_huge_limits_is_planned_within_bounds() {
    let huge = vbd::BackOffer {
        max_queues: Some(u32::MAX),
        max_ring_page_order: Some(u32::MAX),
        ..vbd::BackOffer::default()
    };
    let limits = vbd::FrontLimits { max_queues: u32::MAX, max_ring_page_order: u32::MAX };
    let plan = huge.plan(limits);
    assert_eq!((plan.queues, plan.ring_page_order), (vbd::MAX_QUEUES, vbd::MAX_RING_PAGE_ORDER));
    let none =
        vbd::BackOffer::default().plan(vbd::FrontLimits { max_queues: 0, max_ring_page_order: 3 });
    assert_eq!((none.queues, none.ring_page_order), (1, 0));
    for (pages, order) in [(1, 0), (2, 1), (15, 3), (16, 4), (u32::MAX, 5)] {
        let counted = vbd::BackOffer { max_ring_pages: Some(pages), ..vbd::BackOffer::default() };
        assert_eq!(counted.ring_page_order(), order);
    }
}
