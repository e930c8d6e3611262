//! Keys common to all devices: creation, lookup and removal, states and errors.
#![cfg(feature = "std")]

mod common;

use common::{BACK, FRONT, disk, offer, put, world};
use pvio_ring::DomId;
use pvio_xenbus::handshake::common::{self as dev, BackendKind, DeviceAddr, DeviceClass, Hotplug};
use pvio_xenbus::handshake::{HandshakeError, vbd, vif};
use pvio_xenbus::wire::XsErrno;
use pvio_xenbus::{XenbusState, Xenstore, XsError, transaction};
use pvio_xenstored::LocalClient;

#[test]
fn created_disk_has_libxl_permissions_and_is_listed_by_both_peers() {
    let (mut w, back, front) = disk();
    assert_eq!(back, "/local/domain/2/backend/vbd/5/51712");
    assert_eq!(front, "/local/domain/5/device/vbd/51712");
    let perms = |xs: &mut LocalClient, path: &str| {
        xs.get_perms(path).unwrap().iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    for path in [back.clone(), dev::state_path(&back), dev::online_path(&back)] {
        assert_eq!(perms(&mut w.dom0, &path), ["n2", "r5"], "{path}");
    }
    for path in [front.clone(), dev::state_path(&front)] {
        assert_eq!(perms(&mut w.dom0, &path), ["n5", "r2"], "{path}");
    }
    let addr = DeviceAddr::new(BackendKind::Vbd, BACK, FRONT, 51712);
    assert_eq!(dev::list_backends(&mut w.back, BackendKind::Vbd, BACK).unwrap(), [addr]);
    assert_eq!(dev::list_backends(&mut w.back, BackendKind::Vif, BACK).unwrap(), []);
    assert_eq!(dev::list_frontends(&mut w.front, DeviceClass::Vbd, FRONT).unwrap(), [51712]);
    let keys = vbd::ToolstackBack::read(&mut w.back, &back).unwrap();
    assert_eq!(keys, vbd::ToolstackBack::new(addr, "/srv/disk.img"));
    let keys = vbd::ToolstackFront::read(&mut w.front, &front).unwrap();
    assert_eq!(keys, vbd::ToolstackFront::new(addr, vbd::DeviceType::Disk));
    for (xs, base) in [(&mut w.back, &front), (&mut w.front, &back)] {
        assert_eq!(dev::read_state(xs, base).unwrap(), XenbusState::Initialising);
        let refused = dev::write_state(xs, base, XenbusState::Closed).unwrap_err();
        assert!(
            matches!(refused, HandshakeError::Xenstore(ref e) if e.errno() == Some(XsErrno::Acces))
        );
    }
    let again = vbd::create_device(&mut w.dom0, addr, &full_back(addr)).unwrap_err();
    assert_eq!(again, HandshakeError::Exists { path: front.clone().into() });

    assert!(dev::read_online(&mut w.back, &back).unwrap());
    dev::request_removal(&mut w.dom0, addr).unwrap();
    assert!(!dev::read_online(&mut w.back, &back).unwrap());
    assert_eq!(dev::read_state(&mut w.front, &back).unwrap(), XenbusState::Closing);
    dev::write_error(&mut w.back, &back, 22, "bad").unwrap();
    dev::remove_device(&mut w.dom0, addr).unwrap();
    assert_eq!(dev::list_backends(&mut w.back, BackendKind::Vbd, BACK).unwrap(), []);
    assert_eq!(w.back.directory("backend/vbd").unwrap(), [""; 0]);
    assert_eq!(dev::read_error(&mut w.dom0, &back).unwrap(), None);
    dev::request_removal(&mut w.dom0, addr).unwrap();
    assert_eq!(
        dev::list_backends(&mut w.back, BackendKind::Vbd, BACK).unwrap(),
        [],
        "removed device is not listed"
    );
    vbd::create_device(&mut w.dom0, addr, &full_back(addr)).unwrap();
    w.store.borrow().check().unwrap();
}

fn full_back(addr: DeviceAddr) -> vbd::ToolstackBack {
    vbd::ToolstackBack {
        online: false,
        removable: true,
        bootable: false,
        mode: vbd::Mode::ReadOnly,
        device_type: vbd::DeviceType::Cdrom,
        direct_io_safe: true,
        discard_enable: false,
        options: Some("iops=5,group=a b".into()),
        ..vbd::ToolstackBack::new(addr, "nbd:/run/ü.sock")
    }
}

#[test]
fn libxl_records_follow_device_creation_options_and_removal() {
    let mut w = world();
    let addr = DeviceAddr::new(BackendKind::Vbd, BACK, FRONT, 51728);
    let front = vbd::ToolstackFront {
        trusted: false,
        ..vbd::ToolstackFront::new(addr, vbd::DeviceType::Disk)
    };
    let mut keys = full_back(addr);
    keys.device_type = vbd::DeviceType::Disk;
    vbd::create_device_with(&mut w.dom0, addr, &front, &keys).unwrap();
    dev::record_for_libxl(&mut w.dom0, addr).unwrap();
    assert_eq!(vbd::ToolstackFront::read(&mut w.front, &addr.frontend_path()), Ok(front));
    let kept = format!("/libxl/{FRONT}/device/vbd/51728");
    assert_eq!(w.dom0.read(&format!("{kept}/backend")).unwrap(), addr.backend_path().into_bytes());
    for key in w.dom0.directory(&addr.backend_path()).unwrap() {
        let mut of = |dir: &str| w.dom0.read(&format!("{dir}/{key}")).unwrap();
        assert_eq!(of(&kept), of(&addr.backend_path()), "{key}");
    }
    // Only libxl may read its own records.
    assert!(w.back.read(&format!("{kept}/backend")).is_err());
    let class = dev::DeviceClass::Vbd;
    assert_eq!(dev::find_device(&mut w.dom0, class, FRONT, 51728), Ok(Some(addr)));
    assert_eq!(dev::find_device(&mut w.dom0, class, FRONT, 51712), Ok(None));

    vbd::ToolstackBack::write_options(&mut w.dom0, addr, "iops=7").unwrap();
    let read = vbd::ToolstackBack::read(&mut w.back, &addr.backend_path()).unwrap();
    assert_eq!(read.options.as_deref(), Some(&b"iops=7"[..]));
    // A guest can read them, but cannot change them.
    assert!(vbd::ToolstackBack::write_options(&mut w.front, addr, "iops=none").is_err());

    dev::remove_device(&mut w.dom0, addr).unwrap();
    assert_eq!(w.dom0.read_opt(&kept).unwrap(), None);
    let gone = vbd::ToolstackBack::write_options(&mut w.dom0, addr, "iops=7");
    assert!(
        matches!(gone, Err(HandshakeError::Missing { .. })),
        "write to a removed device creates no node"
    );
    assert_eq!(w.dom0.read_opt(&addr.backend_path()).unwrap(), None);
}

#[test]
fn disk_backing_is_derived_from_kind_script_and_params() {
    let addr = DeviceAddr::new(BackendKind::Vbd, BACK, FRONT, 1);
    let named = |kind: &str, script: Option<&str>, params: &str| {
        let mut back = vbd::ToolstackBack::new(addr, params);
        (back.kind, back.script) = (kind.into(), script.map(Into::into));
        back
    };
    for (back, expected) in [
        (named("phy", None, "a:b"), vbd::Backing::Format("raw", b"a:b")),
        (named("qdisk", None, "aio:/x"), vbd::Backing::Format("raw", b"/x")),
        (named("qdisk", None, "qcow2:/x"), vbd::Backing::Format("qcow2", b"/x")),
        (named("phy", Some("/etc/xen/scripts/block"), "q:x"), vbd::Backing::Format("raw", b"q:x")),
        (
            named("phy", Some("/etc/xen/scripts/block-pvio"), "[ro]q:x"),
            vbd::Backing::Own(b"[ro]q:x"),
        ),
        (named("phy", Some("block-pvio"), "x"), vbd::Backing::Own(b"x")),
        (named("pvio", None, "ram:1M"), vbd::Backing::Own(b"ram:1M")),
    ] {
        assert_eq!(back.backing(), expected);
    }
    // A path is bytes, and xenstore preserves them.
    let (mut w, path) = (world(), b"qcow2:/srv/\xff\t\xc3.img");
    let addr = DeviceAddr::new(BackendKind::Vbd, BACK, FRONT, 51728);
    let keys = vbd::ToolstackBack {
        kind: "qdisk".into(),
        physical_device_path: Some(b"/dev/\x80".into()),
        script: Some(b"/\xfe/block".into()),
        options: Some(b"trace=/\xfd".into()),
        ..vbd::ToolstackBack::new(addr, path)
    };
    vbd::create_device(&mut w.dom0, addr, &keys).unwrap();
    let read = vbd::ToolstackBack::read(&mut w.back, &addr.backend_path()).unwrap();
    assert_eq!(read, keys);
    assert_eq!(read.backing(), vbd::Backing::Format("qcow2", b"/srv/\xff\t\xc3.img"));
    assert!(vbd::changes_live("pvio-options") && !vbd::changes_live("params"));
}

#[test]
fn device_with_mismatched_frontend_or_class_is_not_created() {
    let mut w = world();
    let addr = DeviceAddr::new(BackendKind::Vbd, BACK, FRONT, 1);
    let other = DeviceAddr { front: DomId(6), ..addr };
    let back = vbd::ToolstackBack::new(other, "x");
    assert!(matches!(
        vbd::create_device(&mut w.dom0, addr, &back),
        Err(HandshakeError::Unwritable(_))
    ));
    let nic = DeviceAddr { kind: BackendKind::Vif, ..addr };
    let back = vbd::ToolstackBack::new(nic, "x");
    assert!(matches!(
        vbd::create_device(&mut w.dom0, nic, &back),
        Err(HandshakeError::Unwritable(_))
    ));
    let group = vif::ToolstackBack::new(nic, "01:00:5e:00:00:01".parse().unwrap());
    assert!(matches!(
        vif::create_device(&mut w.dom0, nic, &group),
        Err(HandshakeError::Unwritable(_))
    ));
    assert_eq!(w.dom0.directory("/local/domain/2/backend").unwrap(), [""; 0]);
}

#[test]
fn device_paths_are_parsed_and_invalid_paths_are_none() {
    let addr = DeviceAddr::new(BackendKind::Vif, BACK, FRONT, 3);
    let full = format!("{}/queue-0/state", addr.backend_path());
    assert_eq!(DeviceAddr::from_backend_path(&full, DomId(9)), Some((addr, "queue-0/state")));
    assert_eq!(DeviceAddr::from_backend_path("backend/vif/5/3", BACK), Some((addr, "")));
    for bad in [
        "",
        "/",
        "/local/domain/2",
        "backend/vif/5",
        "backend/vif/x/3",
        "backend/vif/5/-3",
        "backend/pci/5/3",
        "/local/domain/99999/backend/vif/5/3",
        "device/vif/3",
    ] {
        assert_eq!(DeviceAddr::from_backend_path(bad, BACK), None, "{bad}");
    }
    let (class, front, index, below) =
        dev::parse_frontend_path("device/vbd/51712/state", FRONT).unwrap();
    assert_eq!((class, front, index, below), (DeviceClass::Vbd, FRONT, 51712, "state"));
    assert_eq!(
        dev::error_path(&addr.backend_path()).unwrap(),
        "/local/domain/2/error/backend/vif/5/3/error"
    );
    assert_eq!(dev::error_path("/tool/x"), None);
}

#[test]
fn error_node_and_hotplug_status_round_trip() {
    let (mut w, back, front) = disk();
    dev::write_error(&mut w.front, &front, 5, &"é".repeat(2000)).unwrap();
    let keys = dev::read_error(&mut w.dom0, &front).unwrap().unwrap();
    assert!(keys.starts_with("5 éé") && keys.len() <= 1026);
    dev::clear_error(&mut w.front, &front).unwrap();
    dev::clear_error(&mut w.front, &front).unwrap();
    assert_eq!(dev::read_error(&mut w.dom0, &front).unwrap(), None);
    assert_eq!(dev::read_hotplug(&mut w.dom0, &back).unwrap(), None);
    for status in [Hotplug::Failed("no tap".into()), Hotplug::Connected] {
        dev::write_hotplug(&mut w.back, &back, &status).unwrap();
        assert_eq!(dev::read_hotplug(&mut w.dom0, &back).unwrap(), Some(status));
    }
    put(&mut w.dom0, &back, &[("hotplug-status", "odd\n")]);
    let odd = dev::read_hotplug(&mut w.dom0, &back).unwrap_err();
    assert_eq!(
        odd.to_string(),
        format!("`{back}/hotplug-status` is \"odd\", expected connected or error")
    );
}

#[test]
fn state_switch_writes_only_changes_and_creates_no_node() {
    let (mut w, back, front) = disk();
    w.front.watch(&dev::state_path(&back), "t").unwrap();
    common::discard_events(&mut w.front);
    assert!(dev::switch_state(&mut w.back, &back, XenbusState::Initialising).unwrap());
    assert_eq!(w.front.poll_event().unwrap(), None, "unchanged state fires no watch");
    dev::write_state(&mut w.back, &back, XenbusState::Initialising).unwrap();
    assert!(w.front.poll_event().unwrap().is_some(), "repeated state fires a watch");
    assert!(dev::switch_state(&mut w.back, &back, XenbusState::InitWait).unwrap());
    assert_eq!(dev::read_state(&mut w.front, &back).unwrap(), XenbusState::InitWait);
    w.dom0.rm(&back).unwrap();
    assert!(!dev::switch_state(&mut w.back, &back, XenbusState::Connected).unwrap());
    assert_eq!(dev::read_state(&mut w.back, &back).unwrap(), XenbusState::Unknown);
    put(&mut w.front, &front, &[("state", "4 ")]);
    assert_eq!(dev::read_state(&mut w.back, &front).unwrap(), XenbusState::Unknown);
}

/// A transaction with a conflict is repeated; one with a conflict at every attempt fails.
#[test]
fn transaction_retries_are_bounded_and_failed_one_leaves_nothing() {
    let (mut w, back, _front) = disk();
    let mut runs = 0;
    let mut other = LocalClient::connect(&w.store, DomId::DOM0);
    let result: Result<(), XsError> = transaction(&mut w.dom0, |tx| {
        runs += 1;
        tx.read(&dev::state_path(&back))?;
        if runs < 3 {
            other.write(&dev::state_path(&back), b"1")?;
        }
        tx.write("/done", b"")
    });
    assert_eq!((result, runs), (Ok(()), 3));
    let always: Result<(), XsError> = transaction(&mut w.dom0, |tx| {
        tx.read("/done")?;
        other.write("/done", b"")
    });
    assert_eq!(always, Err(XsError::Conflict));
    let failing: Result<(), HandshakeError> = transaction(&mut w.back, |tx| {
        offer().write(tx, &back)?;
        Err(HandshakeError::Unwritable("on purpose"))
    });
    assert!(failing.is_err());
    assert_eq!(vbd::BackOffer::read(&mut w.back, &back).unwrap(), vbd::BackOffer::default());
    // All the transactions above were ended: the guest's quota of ten is free.
    for _ in 0..10 {
        w.back.transaction_start().unwrap();
    }
    w.store.borrow_mut().release(BACK);
    assert_eq!(w.back.read("x"), Err(XsError::Closed));
}
