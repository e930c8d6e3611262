//! Costs of a queue with a tap: no wake-up without a packet, no system call per packet, and bounded
//! memory for a guest that receives nothing, whose own packets are still sent. Runs in separate
//! network namespaces.

mod rig;

use pvio_event_channel::EventChannel;
use pvio_netback::port::NetPort;
use pvio_netback::queue::BACKLOG_BYTES;
use pvio_netback::{Stats, fault::DropReason};
use pvio_netfront::Checksum;
use pvio_ports::host::NicConfig;
use pvio_ports::tap::{Tap, TapConfig, TapPort};
use pvio_ports::wait::WaitPort;
use rig::namespace::{entered, entered_with, ip};
use rig::{GUEST_MAC, Rig, wait_for};
use std::fs;
use std::net::UdpSocket;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

fn quiet_rig(mtu: u32) -> Rig {
    // The kernel must not send packets on its own.
    fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
    let address = Some(([192, 0, 2, 1].into(), 24));
    let options = NicConfig { address, max_queues: Some(1), ..NicConfig::default() };
    Rig::new(options, |vif| (vif.vifname, vif.mtu) = (Some("v0".into()), Some(mtu)))
}

/// Returns the number of wake-ups once it no longer changes.
fn settled(stats: &Stats) -> u64 {
    wait_for(|| {
        let before = stats.wakeups();
        std::thread::sleep(Duration::from_millis(50));
        (stats.wakeups() == before).then_some(before)
    })
}

#[test]
fn idle_queue_is_never_woken() {
    if !entered("idle_queue_is_never_woken", &[]) {
        return;
    }
    let rig = quiet_rig(1500);
    let mut guest = rig.guest();
    let stats = rig.stats();
    let queue = guest.driver.class_mut().queue().unwrap();
    queue.send(&[2; 60], Checksum::Unknown).unwrap();
    queue.publish().unwrap();
    wait_for(|| (stats.tx_packets() > 0).then_some(()));
    let before = settled(&stats);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(stats.wakeups(), before);
    // The worker was asleep, not ended.
    queue.send(&[2; 60], Checksum::Unknown).unwrap();
    queue.publish().unwrap();
    wait_for(|| (stats.tx_packets() > 1).then_some(()));
    assert!(stats.wakeups() > before);
}

#[test]
fn event_storm_without_packets_is_delayed_and_packets_are_still_sent() {
    if !entered("event_storm_without_packets_is_delayed_and_packets_are_still_sent", &[]) {
        return;
    }
    let rig = quiet_rig(1500);
    let mut guest = rig.guest();
    let stats = rig.stats();
    let queue = guest.driver.class_mut().queue().unwrap();
    let before = settled(&stats);
    let (begin, mut events) = (Instant::now(), 0_u64);
    while begin.elapsed() < Duration::from_millis(600) {
        queue.channel().notify().unwrap();
        events += 1;
        std::thread::sleep(Duration::from_micros(20));
    }
    let (wakeups, delays) = (stats.wakeups() - before, stats.delayed_events());
    // Each delay causes at most two: by the event, whose watch is not read, and by its end.
    assert!(events > 1000 && (8..64).contains(&wakeups), "{wakeups} wake-ups by {events} events");
    assert!((5..20).contains(&delays), "{delays} delays");
    // Packets wait for the rest of a delay at most, and end it.
    for n in 1..=50 {
        queue.send(&[2; 60], Checksum::Unknown).unwrap();
        queue.publish().unwrap();
        wait_for(|| (stats.tx_packets() == n).then_some(()));
    }
    assert_eq!(stats.delayed_events(), delays);
}

#[test]
fn guest_without_rx_buffers_still_transmits() {
    if !entered("guest_without_rx_buffers_still_transmits", &[]) {
        return;
    }
    let rig = quiet_rig(9000);
    let mut guest = rig.guest();
    let stats = rig.stats();
    ip(&format!("neigh add 192.0.2.2 lladdr {GUEST_MAC} dev v0")).unwrap();
    let host = UdpSocket::bind("192.0.2.1:0").unwrap();
    let queue = guest.driver.class_mut().queue().unwrap();
    let data = vec![1; 8900];
    // More packets than there is memory for; the kernel drops the rest.
    let dropped = || {
        let link = ip("-s -s link show dev v0").unwrap();
        let mut lines = link.lines().skip_while(|line| !line.trim().starts_with("TX:"));
        lines.nth(1).unwrap().split_whitespace().nth(3).unwrap().parse::<u64>().unwrap()
    };
    wait_for(|| {
        for _ in 0..200 {
            host.send_to(&data, "192.0.2.2:9").unwrap();
        }
        (dropped() > 0).then_some(())
    });
    // Packets that the guest sends are forwarded, and get responses.
    for n in 1..=1000 {
        wait_for(|| {
            let sent = queue.send(&[2; 1000], Checksum::Unknown).is_ok();
            queue.publish().unwrap();
            sent.then_some(())
        });
        if n % 100 == 0 {
            wait_for(|| (stats.tx_packets() == n).then_some(()));
        }
    }
    assert_eq!(stats.dropped(DropReason::TxPort), 0);
}

#[test]
fn tap_without_receiver_buffers_bounded_bytes() {
    if !entered("tap_without_receiver_buffers_bounded_bytes", &[]) {
        return;
    }
    fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
    let address = Some(([192, 0, 2, 1].into(), 24));
    let tap = Tap::create(&TapConfig { address, mtu: 9000, ..TapConfig::new("v0") }).unwrap();
    ip(&format!("neigh add 192.0.2.2 lladdr {GUEST_MAC} dev v0")).unwrap();
    let mut port = TapPort::new(tap, Arc::default()).unwrap();
    let host = UdpSocket::bind("192.0.2.1:0").unwrap();
    // Small packets first, so that several reads are armed.
    for len in [10, 8900] {
        for _ in 0..100 {
            (0..20).for_each(|_| drop(host.send_to(&vec![1; len], "192.0.2.2:9")));
            port.poll().unwrap();
            if len == 10 {
                while let Some(packet) = port.receive() {
                    port.recycle(packet.buf);
                }
            }
        }
    }
    let mut held = 0;
    while let Some(packet) = port.receive() {
        held += packet.len;
    }
    assert!((64 * 1024..BACKLOG_BYTES).contains(&held), "{held}");
}

/// `strace -c` on one thread, ended by dropping it.
struct Strace(Child, std::path::PathBuf);

impl Strace {
    fn of(thread: u32, dir: &std::path::Path) -> Self {
        let out = dir.join("calls");
        let mut strace = Command::new("strace");
        strace.args(["-c", "-p", &thread.to_string(), "-o"]).arg(&out);
        let mut strace = strace.stderr(Stdio::piped()).spawn().unwrap();
        // strace prints a line when it has attached.
        use std::io::{BufRead, BufReader};
        let mut line = String::new();
        let said = BufReader::new(strace.stderr.as_mut().unwrap()).read_line(&mut line);
        assert!(said.unwrap() > 0 && line.contains("attached"), "{line}");
        Self(strace, out)
    }

    /// Returns the number of calls of each system call.
    fn end(mut self) -> Vec<(String, u64)> {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        self.0.wait().unwrap();
        let text = fs::read_to_string(&self.1).unwrap();
        let rows = text.lines().skip(2).take_while(|line| !line.starts_with("---"));
        let row = |line: &str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            Some((words.last()?.to_string(), words.get(3)?.parse().ok()?))
        };
        rows.filter_map(row).collect()
    }
}

#[test]
fn packets_are_batched_and_moved_only_by_io_uring() {
    let name = "packets_are_batched_and_moved_only_by_io_uring";
    if !entered_with(name, &[("strace", "strace")]) {
        return;
    }
    let rig = quiet_rig(1500);
    let mut guest = rig.guest();
    let stats = rig.stats();
    let dir = tempfile::tempdir().unwrap();
    let worker = fs::read_dir("/proc/self/task").unwrap().flatten().find(|task| {
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        name.starts_with("vif-")
    });
    let worker = worker.unwrap().file_name().into_string().unwrap().parse().unwrap();
    let queue = guest.driver.class_mut().queue().unwrap();
    let mut pass = || {
        let (before, mut sent) = (stats.tx_packets(), 0_u64);
        wait_for(|| {
            while sent < 20_000 && queue.send(&[2; 60], Checksum::Unknown).is_ok() {
                sent += 1;
            }
            queue.publish().unwrap();
            (stats.tx_packets() - before >= 20_000).then_some(())
        });
    };
    // After this, the worker has all that it allocates once, mainly memory.
    pass();
    let strace = Strace::of(worker, dir.path());
    pass();
    let calls = strace.end();
    let enter = calls.iter().find(|(name, _)| name == "io_uring_enter").map_or(0, |(_, n)| *n);
    // Taking an event is a read, sending one is a write: their numbers depend on wake-ups, not on
    // packets.
    let others: u64 =
        calls.iter().filter(|(name, _)| name != "io_uring_enter").map(|(_, n)| n).sum();
    assert!(enter > 0 && enter < 5000, "{calls:?}");
    assert!(others < 5000, "{calls:?}");
    let known = ["io_uring_enter", "read", "write", "futex"];
    assert!(calls.iter().all(|(name, _)| known.contains(&name.as_str())), "{calls:?}");
}
