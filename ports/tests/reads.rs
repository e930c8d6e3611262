//! Reading a tap: in batches and in order, with either kind of reads. Runs in separate network
//! namespaces.

#[path = "rig/namespace.rs"]
mod namespace;

use namespace::{entered, ip};
use pvio_netback::port::NetPort;
use pvio_ports::tap::{Tap, TapConfig, TapPort};
use pvio_ports::wait::WaitPort;
use pvio_runtime::WaitPoint;
use std::fs;
use std::net::UdpSocket;
use std::sync::Arc;
use std::time::Duration;

/// Size of Ethernet, IPv4 and UDP headers in bytes.
const HEADERS: usize = 42;

/// Returns a port on a new tap, and a socket of the host that sends to the guest behind it.
fn port(name: &str, standing: bool) -> (TapPort, UdpSocket) {
    // The kernel must not send packets on its own.
    fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
    let net = if standing { 1 } else { 0 };
    let address = Some(([10, 0, net, 1].into(), 24));
    let tap = Tap::create(&TapConfig { address, ..TapConfig::new(name) }).unwrap();
    ip(&format!("neigh add 10.0.{net}.2 lladdr 02:00:00:00:00:02 dev {name}")).unwrap();
    let host = UdpSocket::bind("0.0.0.0:0").unwrap();
    host.connect((std::net::Ipv4Addr::new(10, 0, net, 2), 9)).unwrap();
    let make = if standing { TapPort::standing } else { TapPort::new };
    (make(tap, Arc::default()).unwrap(), host)
}

/// Returns the number in a packet's data.
fn number(frame: &[u8]) -> u32 {
    u32::from_le_bytes(frame[HEADERS..HEADERS + 4].try_into().unwrap())
}

/// Takes all received packets.
fn take(port: &mut TapPort, mut each: impl FnMut(u32)) {
    while let Some(packet) = port.receive() {
        each(number(packet.frame()));
        port.recycle(packet.buf);
    }
}

#[test]
fn burst_of_packets_is_read_in_few_system_calls() {
    if !entered("burst_of_packets_is_read_in_few_system_calls", &[]) {
        return;
    }
    for (name, standing) in [("tries", false), ("stands", true)] {
        let (mut port, host) = port(name, standing);
        // A round is one system call, which reads at most 32 packets.
        for (first, most) in [(0, 12), (200, 9)] {
            for n in first..first + 200_u32 {
                host.send(&n.to_le_bytes()).unwrap();
            }
            let (mut next, mut rounds) = (first, 0);
            port.wait(Some(Duration::from_secs(10))).unwrap();
            while next < first + 200 {
                port.poll().unwrap();
                rounds += 1;
                assert!(rounds <= most, "{name}: {} packets in {rounds} rounds", next - first);
                take(&mut port, |n| {
                    assert_eq!(n, next, "{name}");
                    next += 1;
                });
            }
            // Waits until no work is left and the worker could sleep.
            while port.has_work().unwrap() {
                port.poll().unwrap();
                take(&mut port, |n| panic!("{name}: packet {n} after the last one"));
            }
        }
    }
}

#[test]
fn packets_stay_in_order_while_reads_are_armed_polled_and_gathered() {
    if !entered("packets_stay_in_order_while_reads_are_armed_polled_and_gathered", &[]) {
        return;
    }
    const PACKETS: u32 = 30_000;
    for (name, standing) in [("tries", false), ("stands", true)] {
        let (mut port, host) = port(name, standing);
        let sender = std::thread::spawn(move || {
            for n in 0..=PACKETS {
                // No more packets at a time than the kernel's queue holds, with pauses of different
                // lengths.
                if n % 200 == 0 {
                    std::thread::sleep(Duration::from_micros(u64::from(n / 200 % 7 * 300)));
                }
                host.send(&n.to_le_bytes()).unwrap();
            }
        });
        // Some packets may be lost while this thread does not run; none is reordered.
        let (mut last, mut came) = (None, 0);
        for round in 0.. {
            port.poll().unwrap();
            take(&mut port, |n| {
                assert!(last.is_none_or(|last| last < n), "{name}: {n} after {last:?}");
                (last, came) = (Some(n), came + 1);
            });
            if sender.is_finished() && !port.has_work().unwrap() {
                break;
            }
            match round % 3 {
                0 => port.gather(Duration::from_micros(50)).unwrap(),
                1 => port.wait(Some(Duration::from_millis(1))).unwrap(),
                _ => {}
            }
        }
        sender.join().unwrap();
        assert!(came > 200, "{name}: {came}");
    }
}
