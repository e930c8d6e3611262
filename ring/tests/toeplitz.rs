//! The Toeplitz hash against the vectors that Microsoft publishes: "Verifying the RSS Hash
//! Calculation", in the documentation of Windows network drivers.
#![forbid(unsafe_code)]

use pvio_ring::proto::netif::{HASH_KEY_MAX, HashKind, HashTypes, hash_frame, toeplitz};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const KEY: [u8; HASH_KEY_MAX] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0,
    0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c,
    0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

/// Destination, its port, source, its port; the hash of the addresses, and of addresses and ports.
type Vector = (&'static str, u16, &'static str, u16, u32, u32);

const VECTORS: [Vector; 8] = [
    ("161.142.100.80", 1766, "66.9.149.187", 2794, 0x323e_8fc2, 0x51cc_c178),
    ("65.69.140.83", 4739, "199.92.111.2", 14230, 0xd718_262a, 0xc626_b0ea),
    ("12.22.207.184", 38024, "24.19.198.95", 12898, 0xd2d0_a5de, 0x5c2b_394a),
    ("209.142.163.6", 2217, "38.27.205.30", 48228, 0x8298_9176, 0xafc7_327f),
    ("202.188.127.2", 1303, "153.39.163.191", 44251, 0x5d18_09c5, 0x10e8_28a2),
    ("3ffe:2501:200:3::1", 1766, "3ffe:2501:200:1fff::7", 2794, 0x2cc1_8cd5, 0x4020_7d3d),
    ("ff02::1", 4739, "3ffe:501:8::260:97ff:fe40:efab", 14230, 0x0f0c_461c, 0xdde5_1bbf),
    (
        "fe80::200:f8ff:fe21:67cf",
        38024,
        "3ffe:1900:4545:3:200:f8ff:fe21:67cf",
        44251,
        0x4b61_e985,
        0x02d1_feef,
    ),
];

/// Returns a frame of this protocol between two stations, with `tags` VLAN tags.
fn frame(vector: &Vector, protocol: u8, tags: usize) -> Vec<u8> {
    let (to, to_port, from, from_port, ..) = *vector;
    let mut f = vec![2; 12];
    (0..tags).for_each(|n| f.extend([0x81, 0, 0, n as u8]));
    let octets = |text: &str| match text.parse().unwrap() {
        IpAddr::V4(a) => Ipv4Addr::octets(&a).to_vec(),
        IpAddr::V6(a) => Ipv6Addr::octets(&a).to_vec(),
    };
    if to.contains(':') {
        f.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, protocol, 64]);
    } else {
        f.extend([8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, protocol, 0, 0]);
    }
    f.extend(octets(from));
    f.extend(octets(to));
    f.extend(from_port.to_be_bytes());
    f.extend(to_port.to_be_bytes());
    f.extend([0; 16]);
    f
}

#[test]
fn toeplitz_hash_matches_microsoft_test_vectors() {
    for vector in &VECTORS {
        let (to, .., plain, with_ports) = *vector;
        let (v6, all) = (to.contains(':'), HashTypes::all());
        let (ip, tcp) =
            if v6 { (HashKind::V6, HashKind::V6Tcp) } else { (HashKind::V4, HashKind::V4Tcp) };
        for tags in 0..3 {
            let packet = frame(vector, 6, tags);
            assert_eq!(hash_frame(&packet, all, &KEY), Some((tcp, with_ports)), "{to}");
            // Only the addresses, if only they were requested, or if there are no ports.
            let types = HashTypes::IPV4 | HashTypes::IPV6;
            assert_eq!(hash_frame(&packet, types, &KEY), Some((ip, plain)), "{to}");
            let udp = frame(vector, 17, tags);
            assert_eq!(hash_frame(&udp, all, &KEY), Some((ip, plain)), "{to}");
            let ports = HashTypes::IPV4_TCP | HashTypes::IPV6_TCP;
            assert_eq!(hash_frame(&udp, ports, &KEY), None, "{to}");
        }
    }
}

#[test]
fn frame_without_matching_type_or_ports_is_hashed_accordingly() {
    let all = HashTypes::all();
    let mut packet = frame(&VECTORS[0], 6, 0);
    assert_eq!(hash_frame(&packet, HashTypes::IPV6 | HashTypes::IPV6_TCP, &KEY), None);
    // A fragment, including the first: the others have no ports, and must have the same hash.
    for more in [[0x20, 0], [0, 1]] {
        packet[20..22].copy_from_slice(&more);
        assert_eq!(hash_frame(&packet, all, &KEY), Some((HashKind::V4, VECTORS[0].4)));
    }
    assert_eq!(hash_frame(&packet[..33], all, &KEY), None, "cut short");
    assert_eq!(hash_frame(&[2; 60], all, &KEY), None, "no IP");
    assert_eq!(hash_frame(&[], all, &KEY), None);
    // An empty key makes every hash 0 (as the header defines).
    assert_eq!(toeplitz(&[0; HASH_KEY_MAX], &[0xff; 36]), 0);
}
