//! Packets distributed over a NIC's queues by its steering, and backends without support, or with
//! invalid responses.

mod common;
#[path = "common/control.rs"]
mod ctrl;

use common::{drain, pattern};
use ctrl::{Hostile, Pair, good, hostile, pair};
use pvio_netback::port::memory::{MemoryPort, pair as wire};
use pvio_netback::port::{NetPort, Offload, Packet};
use pvio_netfront::{
    BackendFault, Hash, Queue, Refusal, Steering, SteeringError, SteeringState as State,
};
use pvio_ring::proto::checksum::Transport;
use pvio_ring::proto::netif::{
    CtrlAsk, CtrlRequest, CtrlResponse, CtrlStatus, HashKind, HashTypes, ctrl_type, hash_frame,
};

const KEY: [u8; 40] = *b"forty bytes that nobody could guess. But";
const ALL: HashTypes = HashTypes::all();

fn steering() -> Steering {
    Steering::new(ALL, &KEY).unwrap()
}

/// Returns a segment of TCP over IPv4 of this flow.
fn tcp(flow: u8) -> Vec<u8> {
    let mut f = pattern(100, 1);
    f[0] = 2;
    f[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0, 86, 0, 0, 0, 0, 64, 6]);
    f[26..38].copy_from_slice(&[10, 0, 0, flow, 10, 0, 0, 1, 3, flow, 0, 80]);
    f[46] = 0x50;
    Transport::of(&f).unwrap().fill(&mut f);
    f
}

fn hash_of(frame: &[u8]) -> Hash {
    let (kind, value) = hash_frame(frame, ALL, &KEY).unwrap();
    Hash { kind, value }
}

/// Returns the connections of both queues.
fn wires() -> Vec<(MemoryPort, MemoryPort)> {
    (0..2).map(|_| wire(64)).collect()
}

/// Returns the packets that each queue receives of frames sent from the first connection.
fn received(p: &mut Pair, frames: &[Vec<u8>]) -> [Vec<(Vec<u8>, Option<Hash>)>; 2] {
    let mut wires = wires();
    for frame in frames {
        let mut buf = wires[0].1.reserve().unwrap();
        buf[..frame.len()].copy_from_slice(frame);
        let (len, offload) = (frame.len(), Offload::default());
        wires[0].1.send(Packet { buf, start: 0, len, offload }).unwrap();
    }
    for _ in 0..3 {
        for (back, (port, _)) in p.backs.iter_mut().zip(&mut wires) {
            while back.poll(port, 64).unwrap().any() {}
        }
    }
    wires.iter_mut().for_each(|(_, far)| drain(far));
    let mut got = p.fronts.iter_mut().map(|front| {
        let mut all = Vec::new();
        while let Some(packet) =
            front.receive_packet(|packet| (packet.frame().to_vec(), packet.hash)).unwrap()
        {
            all.push(packet);
        }
        front.publish().unwrap();
        all
    });
    [got.next().unwrap(), got.next().unwrap()]
}

/// Configures steering and waits until it is complete.
fn steer(p: &mut Pair, steering: Option<Steering>) {
    let types = steering.as_ref().map(Steering::types).unwrap_or_default();
    p.fronts.iter_mut().for_each(|queue| queue.take_hashes(types));
    p.control.steer(steering, p.fronts.len());
    p.settle();
    assert!(p.control.is_done());
}

#[test]
fn steered_packets_arrive_on_queue_of_table_with_their_hash() {
    let mut p = pair(true);
    let frames: Vec<_> = (0..32).map(tcp).collect();
    let plain = received(&mut p, &frames);
    assert_eq!(
        (plain[0].len(), plain[1].len()),
        (32, 0),
        "packets stay on their queue without steering"
    );
    assert!(plain[0].iter().all(|(_, hash)| hash.is_none()));

    // All queues evenly; then one table after another, while packets arrive.
    steer(&mut p, Some(steering()));
    assert_eq!(p.control.steering(), State::On);
    let got = received(&mut p, &frames);
    assert!(got.iter().all(|got| got.len() > 4), "{} and {}", got[0].len(), got[1].len());
    for (queue, got) in got.iter().enumerate() {
        for (frame, hash) in got {
            assert_eq!(*hash, Some(hash_of(frame)));
            assert_eq!(hash_of(frame).value as usize % 128 % 2, queue);
        }
    }
    for table in [vec![1], vec![0], vec![0, 1, 1], vec![1; 128]] {
        steer(&mut p, Some(steering().with_table(&table).unwrap()));
        assert_eq!(p.control.steering(), State::On);
        for (queue, got) in received(&mut p, &frames).iter().enumerate() {
            for (frame, hash) in got {
                let value = hash_of(frame).value;
                assert_eq!(table[value as usize % table.len()] as usize, queue);
                assert_eq!(*hash, Some(hash_of(frame)));
            }
        }
    }
    // Packets of other kinds have no hash.
    let v6 = Steering::new(HashTypes::IPV6, &KEY[..3]).unwrap();
    steer(&mut p, Some(v6));
    assert_eq!(received(&mut p, &frames)[0].iter().filter(|(_, h)| h.is_none()).count(), 32);
    steer(&mut p, None);
    assert_eq!((p.control.steering(), p.control.staged()), (State::Off, 1024));
    let plain = received(&mut p, &frames);
    assert_eq!((plain[0].len(), plain[1].len()), (32, 0));
    assert_eq!(p.stats.dropped_in_all(), 0);
}

#[test]
fn invalid_steering_is_rejected_without_request() {
    assert_eq!(Steering::new(HashTypes::empty(), &KEY), Err(SteeringError::NoTypes));
    assert_eq!(Steering::new(ALL, &[0; 41]), Err(SteeringError::Key(41)));
    assert_eq!(steering().with_table(&[]), Err(SteeringError::Table(0)));
    assert_eq!(steering().with_table(&[0; 1025]), Err(SteeringError::Table(1025)));
    assert!(!format!("{:?}", steering()).contains("102, 111"), "key is not shown by Debug");
    let mut p = pair(true);
    steer(&mut p, Some(steering().with_table(&[0, 1, 2]).unwrap()));
    assert_eq!(p.control.steering(), State::NoQueue(2));
    assert_eq!(p.stats.controls(CtrlStatus::Success), 4, "only staging requests were sent");
    // A table that is longer than this backend supports is abandoned.
    steer(&mut p, Some(steering().with_table(&[0; 129]).unwrap()));
    assert_eq!(p.control.steering(), State::NoEntries(128));
    assert_eq!(received(&mut p, &[tcp(1)])[0], [(tcp(1), None)]);
}

/// Returns a hostile backend with steering requested, and a frontend without staging grants.
fn asked_to(steering: Steering) -> Hostile {
    let mut h = hostile();
    h.control = h.control.without_staging();
    h.control.steer(Some(steering), 1);
    h
}

const STEPS: [u16; 7] = [
    ctrl_type::SET_HASH_ALGORITHM,
    ctrl_type::GET_HASH_FLAGS,
    ctrl_type::SET_HASH_KEY,
    ctrl_type::GET_HASH_MAPPING_SIZE,
    ctrl_type::SET_HASH_MAPPING_SIZE,
    ctrl_type::SET_HASH_MAPPING,
    ctrl_type::SET_HASH_FLAGS,
];

/// Returns the response of a correct backend.
fn plain(request: CtrlRequest) -> CtrlResponse {
    let data = match request.kind {
        ctrl_type::GET_HASH_FLAGS => 15,
        ctrl_type::GET_HASH_MAPPING_SIZE => 128,
        _ => 0,
    };
    good(request, data)
}

#[test]
fn steering_requests_are_sent_in_order() {
    let mut h = asked_to(steering().with_table(&[0, 0, 0]).unwrap());
    for kind in STEPS {
        assert_eq!(h.control.steering(), State::Pending);
        let request = h.asked();
        assert_eq!(request.kind, kind);
        match request.ask().unwrap() {
            CtrlAsk::SetHashKey { len, .. } => {
                assert_eq!((len, h.read(request, 40)), (40, KEY.to_vec()));
            }
            CtrlAsk::SetHashMapping { len, offset, .. } => {
                assert_eq!((len, offset, h.read(request, 12)), (3, 0, vec![0; 12]));
            }
            CtrlAsk::SetHashMappingSize(size) => assert_eq!(size, 3),
            CtrlAsk::SetHashFlags(types) => assert_eq!(types, 15),
            CtrlAsk::SetHashAlgorithm(algorithm) => assert_eq!(algorithm, 1),
            _ => {}
        }
        h.answer(plain(request)).unwrap();
    }
    assert_eq!((h.control.steering(), h.control.is_done()), (State::On, true));
    assert!(h.ring.pop().unwrap().is_none());
}

#[test]
fn rejected_steering_request_disables_steering_and_is_reported() {
    for (at, refused) in STEPS.into_iter().enumerate() {
        for status in [1, 2, 3, 4, u32::MAX] {
            let mut h = asked_to(steering());
            for _ in 0..at {
                let request = h.asked();
                h.answer(plain(request)).unwrap();
            }
            let request = h.asked();
            h.answer(CtrlResponse { status, ..plain(request) }).unwrap();
            let state = State::Refused(Refusal { kind: refused, status });
            assert_eq!(h.control.steering(), state);
            // Hashing is disabled; if the backend rejects that, too, the sequence still ends.
            let request = h.asked();
            assert_eq!(request.ask(), Some(CtrlAsk::SetHashAlgorithm(0)));
            h.answer(CtrlResponse { status: 2, ..good(request, 0) }).unwrap();
            assert_eq!((h.control.steering(), h.control.is_done()), (state, true));
            assert!(h.ring.pop().unwrap().is_none());
            let text = state.to_string();
            let code = CtrlStatus::from_number(status).map_or("undefined", CtrlStatus::code);
            assert!(text.contains(code) && text.contains(&refused.to_string()), "{text}");
        }
    }
}

#[test]
fn steering_adapts_to_advertised_table_size_and_hash_types() {
    // (maximum size, then requested size)
    for (most, size) in [(0, 0), (1, 1), (127, 127), (128, 128), (129, 128), (u32::MAX, 128)] {
        let mut h = asked_to(steering());
        for _ in 0..3 {
            let request = h.asked();
            h.answer(plain(request)).unwrap();
        }
        let request = h.asked();
        h.answer(good(request, most)).unwrap();
        let request = h.asked();
        assert_eq!(request.ask(), Some(CtrlAsk::SetHashMappingSize(size)));
        h.answer(plain(request)).unwrap();
        if size > 0 {
            let request = h.asked();
            assert_eq!(request.kind, ctrl_type::SET_HASH_MAPPING);
            h.answer(plain(request)).unwrap();
        }
        let request = h.asked();
        h.answer(good(request, u32::MAX)).unwrap();
        assert_eq!(h.control.steering(), State::On, "{most}");
    }
    for there in [0, 7, 8, 0xffff_fff0] {
        let mut h = asked_to(steering());
        let request = h.asked();
        h.answer(plain(request)).unwrap();
        let request = h.asked();
        h.answer(good(request, there)).unwrap();
        let types = HashTypes::from_bits_truncate(there);
        assert_eq!(h.control.steering(), State::NoTypes(types));
        assert_eq!(h.asked().ask(), Some(CtrlAsk::SetHashAlgorithm(0)));
    }
}

#[test]
fn steering_changed_at_any_step_restarts_sequence() {
    for steps in 0..STEPS.len() {
        for wanted in [None, Some(Steering::new(HashTypes::IPV4, &[7]).unwrap())] {
            let mut h = asked_to(steering());
            for _ in 0..steps {
                let request = h.asked();
                h.answer(plain(request)).unwrap();
            }
            // While a request is outstanding, whose response is taken and ignored.
            let request = h.asked();
            h.control.steer(wanted.clone(), 1);
            let refusal = CtrlResponse { status: 1, ..plain(request) };
            h.answer(if steps % 2 == 0 { refusal } else { plain(request) }).unwrap();
            if wanted.is_none() {
                assert_eq!(h.asked().ask(), Some(CtrlAsk::SetHashAlgorithm(0)));
                assert_eq!(h.control.steering(), State::Off);
                continue;
            }
            for kind in STEPS {
                let request = h.asked();
                assert_eq!(request.kind, kind);
                h.answer(plain(request)).unwrap();
            }
            assert_eq!(h.control.steering(), State::On);
        }
    }
}

#[test]
fn received_hash_of_type_not_requested_is_ignored() {
    use pvio_ring::proto::netif::{Extra, ExtraKind, RxFlags, RxResponse};
    let told = |types: HashTypes, extras: &[(u8, u8)]| {
        let mut h = common::hostile();
        h.front.take_hashes(types);
        let buffer = h.buffer();
        let flags = RxFlags::EXTRA_INFO;
        let first = RxResponse { id: buffer.id, offset: 0, flags, status: 60 };
        h.rx.push(&first.to_bytes()).unwrap();
        for (at, &(kind, algorithm)) in extras.iter().enumerate() {
            h.buffer();
            let kind = ExtraKind::Hash { kind, algorithm, value: 0xfeed };
            let more = at + 1 < extras.len();
            h.rx.push(&Extra { kind, more }.to_bytes()).unwrap();
        }
        let _ = h.rx.publish();
        let got: Result<Option<Option<Hash>>, BackendFault> =
            Queue::receive_packet(&mut h.front, |packet| packet.hash);
        got.map(|hash| hash.expect("a packet"))
    };
    let hash = |kind| Ok(Some(Hash { kind, value: 0xfeed }));
    assert_eq!(told(ALL, &[(0, 1)]), hash(HashKind::V4));
    assert_eq!(told(ALL, &[(1, 1)]), hash(HashKind::V4Tcp));
    assert_eq!(told(ALL, &[(2, 1)]), hash(HashKind::V6));
    assert_eq!(told(ALL, &[(3, 1)]), hash(HashKind::V6Tcp));
    for (types, extra) in [
        (ALL, (4, 1)),
        (ALL, (255, 1)),
        (ALL, (1, 0)),
        (ALL, (1, 2)),
        (HashTypes::IPV4, (1, 1)),
        (HashTypes::empty(), (0, 1)),
    ] {
        assert_eq!(told(types, &[extra]), Ok(None), "{types:?}, {extra:?}");
    }
    assert_eq!(told(ALL, &[(0, 1); 4]), hash(HashKind::V4), "last hash applies");
    assert_eq!(told(ALL, &[(0, 1); 5]), Err(BackendFault::RxSlots), "too many extra segments");
}
