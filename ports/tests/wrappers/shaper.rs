//! Rate limits of one vif and shared rates of several.

use super::*;

/// Returns the bytes that pass a port in the given time in milliseconds, tried at every `step`.
fn bytes_in(
    port: &mut impl NetPort<Buf = Box<[u8]>>,
    wire: &mut MemoryPort,
    (from, time, step): (Duration, Duration, Duration),
    len: usize,
) -> usize {
    let (mut now, mut sent) = (from, 0);
    while now < from + time {
        port.set_clock(now);
        while let Ok(buf) = port.reserve() {
            let buf = port.fit(buf, len);
            port.send(Packet { buf, start: 0, len, offload: Offload::default() }).unwrap();
            sent += received(wire).iter().map(Vec::len).sum::<usize>();
        }
        let deadline = port.deadline().expect("port is blocked");
        assert!(deadline > now && deadline <= now + 100 * MS);
        now += step;
    }
    sent
}

#[test]
fn shaper_limits_bytes_and_packets_and_delays_excess() {
    let (port, mut wire) = pair(4);
    let shapes = Shapes::default();
    let mut port = shapes.wrap(port);
    let limit = |per_second, burst| Some(BucketRate::per_second(per_second, burst));
    let bytes = DirectionLimits { bytes: limit(1_000_000, 50_000), packets: None };
    shapes.set(&Shape { tx: bytes, ..Shape::default() });
    let sent = bytes_in(&mut port, &mut wire, (MS, 4000 * MS, MS), 1500);
    assert!((3_990_000..4_055_000).contains(&sent), "{sent}");
    // Large packets make the level negative, and the average rate is correct.
    let sent = bytes_in(&mut port, &mut wire, (5000 * MS, 10_000 * MS, MS), 65_000);
    assert!((9_900_000..10_200_000).contains(&sent), "{sent}");
    let packets = DirectionLimits { bytes: None, packets: limit(500, 10) };
    shapes.set(&Shape { tx: packets, ..Shape::default() });
    let sent = bytes_in(&mut port, &mut wire, (20_000 * MS, 2000 * MS, MS), 100);
    assert!((99_800..101_200).contains(&sent), "{sent}");
    // To the guest: packets that may not pass stay in the port.
    shapes.set(&Shape { rx: packets, ..Shape::default() });
    port.set_clock(30_000 * MS);
    (0..4).for_each(|n| send(&mut wire, &numbered(n, 60)).unwrap());
    let mut got = received(&mut port).len();
    for n in 4..100 {
        got += received(&mut port).len();
        if let Ok(buf) = wire.reserve() {
            wire.send(Packet { buf, start: 0, len: 60 + n, offload: Offload::default() }).unwrap();
        }
    }
    assert_eq!(got, 11, "a burst and one packet at the same time");
    assert!(wire.reserve().is_err() && port.deadline().is_some());
    shapes.set(&Shape::default());
    port.set_clock(30_001 * MS);
    assert_eq!((received(&mut port).len(), port.deadline()), (4, None));
}

/// Returns a TCP over IPv4 packet without options, with `data` bytes of data.
fn tcp4(data: usize) -> Vec<u8> {
    let mut frame = Vec::new();
    let builder = PacketBuilder::ethernet2(MAC, OTHER).ipv4([192, 0, 2, 2], [192, 0, 2, 1], 64);
    builder.tcp(1, 2, 3, 4).write(&mut frame, &vec![7; data]).unwrap();
    frame
}

#[test]
fn shaper_charges_gso_packet_as_its_segments_both_ways() {
    let frame = tcp4(20_000);
    let gso = Some(Gso { size: 100, kind: GsoKind::TcpV4 });
    let offload = Offload { checksum: Checksum::Partial { start: 34, offset: 16 }, gso };
    // 200 frames of 154 bytes each.
    let (frames, bytes) = (200, 200 * 154);
    let rate = |per_second| Some(BucketRate::per_second(per_second, 1));
    for (limits, per_second) in [
        (DirectionLimits { bytes: None, packets: rate(2000) }, 2000 / frames),
        (DirectionLimits { bytes: rate(308_000), packets: None }, 308_000 / bytes),
    ] {
        let (port, mut wire) = pair(4);
        let shapes = Shapes::default();
        let mut port = shapes.wrap(port);
        shapes.set(&Shape { tx: limits, rx: limits, share: None });
        let mut passed = [0, 0];
        for tick in 0..10_000 {
            port.set_clock(MS * (tick + 1));
            if let Ok(buf) = port.reserve() {
                let mut buf = port.fit(buf, frame.len());
                buf[..frame.len()].copy_from_slice(&frame);
                port.send(Packet { buf, start: 0, len: frame.len(), offload }).unwrap();
            }
            passed[0] += received(&mut wire).len();
            if wire.reserve().map(|buf| wire.unreserve(buf)).is_ok() {
                send_with(&mut wire, &frame, offload).unwrap();
            }
            passed[1] += received(&mut port).len();
        }
        // In ten seconds, plus one for the burst.
        let expected = 10 * per_second;
        assert!(
            passed.iter().all(|n| (expected..=expected + 2).contains(n)),
            "{passed:?} {limits:?}"
        );
    }
}

#[test]
fn vifs_with_shared_rate_get_equal_parts_at_any_polling_rate() {
    let share = SharedRate::new(BucketRate::per_second(10_000_000, 100_000));
    let shapes: [Shapes; 3] = Default::default();
    shapes
        .iter()
        .for_each(|s| s.set(&Shape { share: Some(Arc::clone(&share)), ..Shape::default() }));
    let mut ends = shapes.each_ref().map(|shape| {
        let (port, wire) = pair(4);
        (shape.wrap(port), wire)
    });
    // The vifs try to send every 0.1 ms, 1 ms and 3 ms, with packets of different sizes.
    let mut sent = [0; 3];
    let mut run = |from: u64, ticks: u64, who: &[usize], lens: [usize; 3]| {
        for tick in from..from + ticks {
            for &one in who.iter().filter(|one| tick % [1, 10, 30][**one] == 0) {
                let (port, wire) = &mut ends[one];
                port.set_clock(Duration::from_micros(100 * (tick + 1)));
                while let Ok(buf) = port.reserve() {
                    let (len, offload) = (lens[one], Offload::default());
                    let buf = port.fit(buf, len);
                    port.send(Packet { buf, start: 0, len, offload }).unwrap();
                    sent[one] += received(wire).iter().map(Vec::len).sum::<usize>();
                }
            }
        }
        std::mem::take(&mut sent)
    };
    let all = run(0, 40_000, &[0, 1, 2], [1500, 64, 9000]);
    let sum: usize = all.iter().sum();
    assert!((39_500_000..40_800_000).contains(&sum), "{all:?}");
    assert!(all.iter().all(|one| one.abs_diff(sum / 3) < sum / 30), "{all:?}");
    // A vif that sends nothing leaves its part to the others, and accumulates no credit.
    let all = run(40_000, 40_000, &[0, 1], [1500, 1500, 0]);
    assert!(all[0] + all[1] > 39_500_000 && all[0].abs_diff(all[1]) < 1_300_000, "{all:?}");
    let all = run(80_000, 10_000, &[0, 1, 2], [1500, 1500, 1500]);
    let sum: usize = all.iter().sum();
    assert!(all.iter().all(|one| one.abs_diff(sum / 3) < sum / 20), "{all:?}");
}
