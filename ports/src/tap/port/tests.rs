use super::*;
use crate::tap::TapConfig;
use std::net::UdpSocket;
use std::time::Instant;

#[path = "../../../tests/rig/namespace.rs"]
mod namespace;

use namespace::{entered, ip};

const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn read_error_ends_tap_only_if_interface_is_gone() {
    for gone in [77, 9, 19, 6] {
        assert!(is_gone(gone), "{gone}");
    }
    for passing in [4, 5, 11, 12, 14, 22, 90, 105] {
        assert!(!is_gone(passing), "{passing}");
    }
}

/// Makes the kernel send a packet to the tap: an ARP request for an address.
fn provoke(host: u8) {
    let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
    let to = std::net::SocketAddrV4::new([192, 0, 2, host].into(), 9);
    socket.send_to(b"x", to).unwrap();
}

/// Runs rounds of the port until there is an outcome.
fn until<T>(
    port: &mut TapPort,
    mut found: impl FnMut(&mut TapPort, io::Result<()>) -> Option<T>,
) -> T {
    static BEGIN: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    let (begin, end) = (*BEGIN.get_or_init(Instant::now), Instant::now() + PATIENCE);
    let mut host = 2;
    loop {
        port.set_clock(begin.elapsed());
        let polled = port.poll();
        if let Some(found) = found(port, polled) {
            return found;
        }
        assert!(Instant::now() < end, "condition was not reached");
        if host < 250 && ip("link show dev t").is_some() {
            provoke(host);
            host += 1;
        }
        let pause = port.deadline().map(|at| at.saturating_sub(begin.elapsed()));
        port.wait(pause.or(Some(Duration::from_millis(10)))).unwrap();
    }
}

#[test]
fn failed_tap_reads_are_counted_and_retried_until_interface_is_gone() {
    let name = "tap::port::tests::failed_tap_reads_are_counted_and_retried_until_interface_is_gone";
    if !entered(name, &[]) {
        return;
    }
    for standing in [false, true] {
        let address = Some(([192, 0, 2, 1].into(), 24));
        let tap = Tap::create(&TapConfig { address, ..TapConfig::new("t") }).unwrap();
        let (same, stats) = (tap.try_clone().unwrap(), Arc::new(Stats::default()));
        let mut port = TapPort::reading(tap, stats.clone(), !standing).unwrap();
        until(&mut port, |port, polled| {
            polled.unwrap();
            port.receive().map(|packet| port.recycle(packet.buf))
        });
        // A header larger than every buffer: every read fails with EINVAL.
        same.set_header_size(READ_LEN + 1).unwrap();
        until(&mut port, |_, polled| {
            polled.unwrap();
            (stats.dropped(DropReason::RxPort) >= 5).then_some(())
        });
        assert!(port.paused.is_some(), "failed reads are paused");
        same.set_header_size(VNET_HEADER).unwrap();
        while let Some(packet) = port.receive() {
            port.recycle(packet.buf);
        }
        until(&mut port, |port, polled| {
            polled.unwrap();
            port.receive().map(|packet| port.recycle(packet.buf))
        });
        assert_eq!((port.paused, port.backoff), (None, Backoff::default()));
        drop(same);
        ip("link del dev t").unwrap();
        let gone = until(&mut port, |_, polled| polled.err());
        assert_eq!(gone.raw_os_error(), Some(77), "EBADFD");
    }
}

#[test]
fn port_executes_its_operations_and_no_others() {
    const EACCES: i32 = 13;
    /// `IORING_OP_*` (`linux/io_uring.h`) that a tap does not need.
    const NOT_NEEDED: [(&str, u8); 8] = [
        ("FSYNC", 3),
        ("SENDMSG", 9),
        ("CONNECT", 16),
        ("FALLOCATE", 17),
        ("OPENAT", 18),
        ("OPENAT2", 28),
        ("SOCKET", 45),
        ("URING_CMD", 46),
    ];
    let name = "tap::port::tests::port_executes_its_operations_and_no_others";
    if !entered(name, &[]) {
        return;
    }
    for standing in [false, true] {
        let address = Some(([192, 0, 2, 1].into(), 24));
        let tap = Tap::create(&TapConfig { address, ..TapConfig::new("t") }).unwrap();
        let stats = Arc::new(Stats::default());
        let mut port = TapPort::reading(tap, stats.clone(), !standing).unwrap();
        for (name, opcode) in NOT_NEEDED {
            assert_eq!(port.uring.attempt(opcode).unwrap(), -EACCES, "{name}");
        }
        for attempt in port.uring.attempt_register() {
            assert_eq!(attempt.unwrap_err().raw_os_error(), Some(EACCES));
        }
        // A read, and a write of the same frame.
        until(&mut port, |port, polled| {
            polled.unwrap();
            let packet = port.receive()?;
            let (mut buf, start) = (port.reserve().unwrap(), TapPort::HEADROOM);
            let end = start + packet.len;
            buf.as_mut_slice()[start..end].copy_from_slice(packet.frame());
            let (len, offload) = (packet.len, packet.offload);
            port.recycle(packet.buf);
            port.send(Packet { buf, start, len, offload }).unwrap();
            port.flush();
            Some(())
        });
        let stands = |port: &TapPort| port.uring.busy() <= port.reads.standing;
        until(&mut port, |port, polled| {
            polled.unwrap();
            stands(port).then_some(())
        });
        assert_eq!(stats.dropped_in_all(), 0, "a read or a write failed");
        ip("link del dev t").unwrap();
    }
}
