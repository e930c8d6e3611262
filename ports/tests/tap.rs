//! Creation of taps, in a separate network namespace.

#[path = "rig/namespace.rs"]
mod namespace;

use namespace::{entered, ip};
use pvio_ports::tap::{HOST_MAC, Tap, TapConfig, TapError};
use pvio_ring::error::Remedy;

#[test]
fn created_tap_has_requested_settings_and_is_removed_with_last_handle() {
    if !entered("created_tap_has_requested_settings_and_is_removed_with_last_handle", &[]) {
        return;
    }
    ip("link add br0 type bridge").unwrap();
    let tap = Tap::create(&TapConfig {
        mac: [2, 1, 2, 3, 4, 5],
        mtu: 9000,
        bridge: Some("br0".into()),
        address: Some(([192, 0, 2, 1].into(), 25)),
        ..TapConfig::new("vif7.0")
    })
    .unwrap();
    assert_eq!((tap.name(), tap.mtu()), ("vif7.0", 9000));
    let link = ip("-o link show dev vif7.0").unwrap();
    for part in [" mtu 9000 ", " master br0 ", "link/ether 02:01:02:03:04:05 ", ",UP"] {
        assert!(link.contains(part), "no {part:?} in {link}");
    }
    let address = ip("-o -4 addr show dev vif7.0").unwrap();
    assert!(address.contains(" 192.0.2.1/25 "), "{address}");

    tap.set_carrier(false).unwrap();
    assert!(ip("-o link show dev vif7.0").unwrap().contains("NO-CARRIER"));
    tap.set_carrier(true).unwrap();
    assert!(!ip("-o link show dev vif7.0").unwrap().contains("NO-CARRIER"));

    let other = tap.try_clone().unwrap();
    drop(tap);
    assert!(ip("link show dev vif7.0").is_some());
    drop(other);
    assert!(ip("link show dev vif7.0").is_none());
}

#[test]
fn tap_host_mac_is_never_chosen_by_bridge() {
    if !entered("tap_host_mac_is_never_chosen_by_bridge", &[]) {
        return;
    }
    assert_eq!(HOST_MAC, [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff]);
    let _tap = Tap::create(&TapConfig::new("t")).unwrap();
    let link = ip("-o link show dev t").unwrap();
    assert!(link.contains("link/ether fe:ff:ff:ff:ff:ff "), "{link}");
    assert!(link.contains(" mtu 1500 "), "{link}");
}

#[test]
fn failed_tap_creation_is_reported_with_its_code() {
    if !entered("failed_tap_creation_is_reported_with_its_code", &[]) {
        return;
    }
    let refused = |config: TapConfig| {
        let error = Tap::create(&config).unwrap_err();
        (error.clone(), error.code())
    };
    let _tap = Tap::create(&TapConfig::new("taken")).unwrap();
    assert_eq!(
        refused(TapConfig::new("taken")),
        (TapError::NameInUse("taken".into()), "tap-name-in-use")
    );
    ip("link add other type bridge").unwrap();
    assert_eq!(refused(TapConfig::new("other")).1, "tap-name-in-use");
    let on = |bridge: &str| TapConfig { bridge: Some(bridge.into()), ..TapConfig::new("new") };
    assert_eq!(refused(on("nope")), (TapError::NoBridge("nope".into()), "tap-no-bridge"));
    assert_eq!(refused(on("lo")), (TapError::NotABridge("lo".into()), "tap-not-a-bridge"));
    assert_eq!(refused(on("")), (TapError::NoBridge("".into()), "tap-no-bridge"));
    assert_eq!(refused(TapConfig { mtu: 10, ..TapConfig::new("new") }).1, "tap-system");
    let address = Some(([192, 0, 2, 1].into(), 33));
    assert_eq!(refused(TapConfig { address, ..TapConfig::new("new") }).1, "tap-system");
    let mac = [1, 0, 0, 0, 0, 0];
    assert_eq!(refused(TapConfig { mac, ..TapConfig::new("new") }).1, "tap-system");
    assert!(ip("link show dev new").is_none(), "interface was not removed");
}

#[test]
fn tap_creation_without_cap_net_admin_names_capability() {
    let without = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"];
    if !entered("tap_creation_without_cap_net_admin_names_capability", &without) {
        return;
    }
    let error = Tap::create(&TapConfig::new("new")).unwrap_err();
    assert_eq!(error.code(), "tap-not-permitted");
    assert!(error.remedy().unwrap_or_default().contains("CAP_NET_ADMIN"), "{error}");
}

#[test]
fn existing_tap_is_opened_by_name_or_file_descriptor() {
    if !entered("existing_tap_is_opened_by_name_or_file_descriptor", &[]) {
        return;
    }
    ip("tuntap add dev single mode tap").unwrap();
    ip("tuntap add dev many mode tap multi_queue").unwrap();
    ip("tuntap add dev tun mode tun").unwrap();
    ip("link set many mtu 4000").unwrap();
    assert_eq!(Tap::open("single", false).unwrap().mtu(), 1500);
    let many = Tap::open("many", true).unwrap();
    assert_eq!((many.name(), many.mtu()), ("many", 4000));
    many.add_queue().unwrap();
    for (name, several) in
        [("single", true), ("many", false), ("tun", false), ("lo", false), ("x", true)]
    {
        let error = Tap::open(name, several).unwrap_err();
        assert_eq!(error, TapError::NotATap(name.into()), "{name}");
    }
    drop(many);
    assert!(ip("link show dev many").is_some(), "interface persists after its handle is dropped");

    let made = Tap::create(&TapConfig { mtu: 2000, ..TapConfig::new("made") }).unwrap();
    let tap = Tap::from_fd(made.into_fd()).unwrap();
    assert_eq!((tap.name(), tap.mtu()), ("made", 2000));
    tap.set_carrier(false).unwrap();
    let none = std::fs::File::open("/dev/null").unwrap();
    assert_eq!(Tap::from_fd(none.into()).unwrap_err().code(), "tap-not-a-tap");
    let unattached = std::fs::File::open("/dev/net/tun").unwrap();
    assert_eq!(Tap::from_fd(unattached.into()).unwrap_err().code(), "tap-not-a-tap");
}
