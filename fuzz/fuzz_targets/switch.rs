//! Two vifs of a switch behind all wrappers of a port: capture, guard, shaper and faults, and the
//! segmentation of packets for a member that takes none.
//!
//! A guarded guest sends only with its own addresses. Frames that arrive have a valid size, a segment has a
//! correct checksum, and the capture is a file that can be read.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pvio_fuzz::nic::Frame;
use pvio_netback::Stats;
use pvio_ports::options::NicOptions;
use pvio_ports::pcapng::CaptureFile;
use pvio_ports::settings::{RuntimeSettings, SharedRates, WrapperSettings};
use pvio_ports::switch::{Switch, SwitchQueue};
use pvio_ports::{FRAME_MAX, NetPort, Packet, PacketBuf};
use pvio_ring::proto::checksum::Transport;
use std::sync::Arc;
use std::time::Duration;

const OWN: [u8; 6] = [2, 0, 0, 0, 0, 2];

#[derive(Arbitrary, Debug)]
struct Input {
    takes: [(bool, bool); 2],
    capture: Option<u16>,
    actions: Vec<Action>,
}

#[derive(Arbitrary, Debug)]
enum Action {
    Send {
        from: bool,
        frame: Frame,
    },
    /// A frame of any bytes.
    Raw {
        from: bool,
        bytes: Vec<u8>,
    },
    Receive(bool),
    Tick(u16),
    /// Options of the first vif.
    Options {
        guard: u8,
        limits: u8,
        loss: u8,
        delay: u8,
    },
}

fuzz_target!(|input: Input| {
    let switch = Switch::new();
    let stats = Arc::new(Stats::default());
    let members = input.takes.map(|takes| switch.join(1, takes).expect("a descriptor"));
    let settings = [RuntimeSettings::default(), RuntimeSettings::default()];
    let mut ports: Vec<_> = members
        .iter()
        .zip(&settings)
        .map(|(member, settings)| {
            let queue = SwitchQueue::new(member.queue(0).expect("the first queue"), &stats);
            settings.wrap(queue, Arc::clone(&stats), 0)
        })
        .collect();
    let capture = input.capture.map(|snaplen| {
        // The memory of a capture is that of its records.
        let snaplen = usize::from(snaplen % 256);
        let file = CaptureFile::begin(Vec::new(), "vif1.0", snaplen).expect("memory");
        (settings[0].probe.open(snaplen).expect("the only capture"), file)
    });
    let mut capture = capture;
    let mut guarded = false;
    let mut now = Duration::ZERO;

    for action in input.actions.into_iter().take(40) {
        match action {
            Action::Send { from, frame } => {
                send(&mut ports[usize::from(from)], &frame.bytes(), frame.offload());
            }
            Action::Raw { from, bytes } => {
                send(&mut ports[usize::from(from)], &bytes, Default::default());
            }
            Action::Receive(at) => {
                let takes = input.takes[usize::from(at)];
                let port = &mut ports[usize::from(at)];
                for _ in 0..64 {
                    let Some(packet) = port.receive() else { break };
                    let frame = packet.frame();
                    assert!(frame.len() <= FRAME_MAX, "a frame of {} bytes", frame.len());
                    if let Some(gso) = packet.offload.gso {
                        let taken = match gso.kind {
                            pvio_ring::proto::netif::GsoKind::TcpV4 => takes.0,
                            pvio_ring::proto::netif::GsoKind::TcpV6 => takes.1,
                        };
                        assert!(taken, "an unsegmented packet for a member that takes none");
                    }
                    if at && guarded && frame.len() >= 12 {
                        assert_eq!(frame[6..12], OWN, "a guarded guest sent with another address");
                    }
                    port.recycle(packet.buf);
                }
            }
            Action::Tick(millis) => {
                now += Duration::from_millis(millis.into());
                ports.iter_mut().for_each(|port| port.set_clock(now));
            }
            Action::Options { guard, limits, loss, delay } => {
                let guard = ["off", "mac", "ip"][usize::from(guard % 3)];
                let mut words = format!("guard={guard},loss={loss}%,delay={delay}ms");
                words += ["", ",tx=10k", ",txpps=5", ",rx=1k/1k,rxpps=1"][usize::from(limits % 4)];
                let Ok(options) = NicOptions::default().and(&words) else { continue };
                let addresses = Some("10.0.0.1 fd00::/8".into());
                let all = WrapperSettings { options, mac: OWN, addresses };
                settings[0].apply(&all, &SharedRates::new()).expect("valid options");
                now += Duration::from_millis(1);
                ports.iter_mut().for_each(|port| port.set_clock(now));
                // What was sent under the previous rules.
                drain(&mut ports);
                guarded = guard != "off" && delay == 0;
            }
        }
        if let Some((reader, file)) = &mut capture {
            reader
                .read(Duration::ZERO, |packet| {
                    assert!(packet.data.len() <= packet.len, "more bytes than the packet has");
                    file.add(packet).map(|()| true)
                })
                .expect("memory");
        }
    }
    drop(ports);
    if let Some((reader, file)) = capture {
        let count = file.packets();
        let bytes = file.end(reader.lost()).expect("memory");
        assert!(bytes.len() as u64 >= count * 32, "records are missing");
    }
    drop(members);
    assert_eq!(switch.members(), 0);
});

fn send<N: NetPort>(port: &mut N, frame: &[u8], offload: pvio_ports::Offload) {
    // A queue sends frames of these sizes.
    if frame.len() < 14 || frame.len() > 65535 {
        return;
    }
    if let Ok(buf) = port.reserve() {
        let mut buf = port.fit(buf, frame.len());
        let start = N::HEADROOM;
        buf.bytes_mut()[start..start + frame.len()].copy_from_slice(frame);
        // A guest's blank checksum is where its headers say.
        let offload = match (offload.checksum, Transport::of(frame)) {
            (pvio_ports::Checksum::Partial { .. }, Ok(transport)) => pvio_ports::Offload {
                checksum: pvio_ports::Checksum::Partial {
                    start: transport.start as u16,
                    offset: if transport.udp { 6 } else { 16 },
                },
                ..offload
            },
            (pvio_ports::Checksum::Partial { .. }, Err(_)) => Default::default(),
            _ => offload,
        };
        let _ = port.send(Packet { buf, start, len: frame.len(), offload });
        port.flush();
    }
}

fn drain<N: NetPort>(ports: &mut [N]) {
    for port in ports {
        for _ in 0..64 {
            let Some(packet) = port.receive() else { break };
            port.recycle(packet.buf);
        }
    }
}
