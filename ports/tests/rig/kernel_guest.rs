//! A guest that uses the kernel's TCP/IP stack: a tap in a separate network namespace, connected to
//! a frontend. Programs run in that namespace as they would in a guest.

use super::namespace::ip;
use super::{GUEST_MAC, Rig};
use pvio_netback::Stats;
use pvio_netback::port::{self, NetPort, Offload, Packet, PacketBuf};
use pvio_netfront::{Checksum, Gso, Nic, Queue};
use pvio_ports::tap::{Tap, TapConfig, TapPort, inside};
use pvio_ports::wait::WaitPort;
use pvio_ring::proto::checksum::Transport;
use pvio_runtime::WaitPoint;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Network namespace with this process's prefix, deleted when dropped.
pub struct Space(pub String);

impl Space {
    pub fn new(kind: &str) -> Self {
        let space = Self(format!("pvio-{kind}-{}", std::process::id()));
        ip(&format!("netns add {}", space.0)).expect("a namespace");
        space.ip("link set lo up");
        space
    }

    pub fn ip(&self, args: &str) {
        ip(&format!("-n {} {args}", self.0)).unwrap_or_else(|| panic!("ip {args}"));
    }

    /// Returns a command that runs inside.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0, program]);
        command
    }

    /// Runs a command and returns its output.
    pub fn run(&self, line: &str) -> String {
        let mut words = line.split(' ');
        let out = self.command(words.next().unwrap()).args(words).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let error = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{line}: {text}{error}");
        text
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        let _ = ip(&format!("netns del {}", self.0));
    }
}

/// Running frontend.
pub struct KernelGuest {
    pub space: Space,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl KernelGuest {
    /// Attaches the rig's NIC as `eth0` of a namespace.
    pub fn attach(rig: &Rig, mtu: u32) -> Self {
        let space = Space::new("guest");
        let mut config = TapConfig { mac: GUEST_MAC.0, mtu, ..TapConfig::new("eth0") };
        config.queue_len = 1000;
        let tap = inside(&space.0, || Tap::create(&config)).unwrap();
        tap.set_unsegmented(true, true).unwrap();
        let domain = rig.domain();
        let mut guest =
            super::Guest::attach(&domain, rig.addr, Nic::new(domain.clone()).taking_gso());
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut tap = TapPort::new(tap, Arc::new(Stats::default())).unwrap();
            let queue = guest.driver.class_mut().queue().expect("connected");
            let event = tap.watch(queue.channel().as_fd().try_clone_to_owned().unwrap()).unwrap();
            while !stopped.load(Ordering::Relaxed) {
                tap.poll().unwrap();
                if tap.fired(event) {
                    use pvio_event_channel::EventChannel as _;
                    let _ = queue.channel().take();
                }
                let moved = to_guest(queue, &mut tap) + from_guest(queue, &mut tap);
                tap.flush();
                queue.publish().unwrap();
                if moved == 0 && !queue.final_check().unwrap() {
                    tap.wait(Some(Duration::from_millis(2))).unwrap();
                }
            }
            guest.close();
        });
        Self { space, stop, thread: Some(thread) }
    }
}

fn to_guest(queue: &mut Queue<pvio_hosted::Domain>, tap: &mut TapPort) -> usize {
    let mut count = 0;
    while let Ok(buf) = tap.reserve() {
        let mut buf = Some(buf);
        let got = queue.receive_with_gso(|frame, checksum, gso| {
            let mut buf = tap.fit(buf.take().unwrap(), frame.len());
            let start = TapPort::HEADROOM;
            buf.bytes_mut()[start..start + frame.len()].copy_from_slice(frame);
            let checksum = match (checksum, Transport::of(frame)) {
                (Checksum::Blank, Ok(t)) => {
                    let (start, offset) = (t.start as u16, t.offset as u16);
                    port::Checksum::Partial { start, offset }
                }
                _ => port::Checksum::Unknown,
            };
            let gso = gso.map(|gso| port::Gso { size: gso.size, kind: gso.kind });
            let offload = Offload { checksum, gso };
            tap.send(Packet { buf, start, len: frame.len(), offload }).unwrap();
        });
        if got.unwrap().is_none() {
            buf.into_iter().for_each(|buf| tap.unreserve(buf));
            break;
        }
        count += 1;
    }
    count
}

fn from_guest(queue: &mut Queue<pvio_hosted::Domain>, tap: &mut TapPort) -> usize {
    let mut count = 0;
    while queue.has_room(18).unwrap()
        && let Some(packet) = tap.receive()
    {
        count += 1;
        let blank = matches!(packet.offload.checksum, port::Checksum::Partial { .. });
        let checksum = if blank { Checksum::Blank } else { Checksum::Unknown };
        let sent = match packet.offload.gso {
            Some(gso) => queue.send_gso(packet.frame(), Gso { size: gso.size, kind: gso.kind }),
            None => queue.send(packet.frame(), checksum),
        };
        sent.unwrap();
        tap.recycle(packet.buf);
    }
    count
}

impl Drop for KernelGuest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the guest panicked");
        }
    }
}
