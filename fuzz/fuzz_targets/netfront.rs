//! A queue of a virtual NIC, frontend side, and its control ring, with a hostile backend.
//!
//! A fault of the backend is permanent. Received packets are inside the frontend's own memory and have a
//! valid size. Then the backend can be detached, and nothing is leaked.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pvio_event_channel::{EventChannel, EventChannels};
use pvio_fuzz::{BACK, Domains, FRONT, Scribble};
use pvio_grant_table::{Access, GrantMapper};
use pvio_netfront::{Checksum, Control, Features, Gso, Queue, Steering};
use pvio_ring::BackRing;
use pvio_ring::proto::netif::{
    CTRL_SLOT_SIZE, CtrlRequest, CtrlResponse, GsoKind, HashTypes, RX_SLOT_SIZE, RxFlags,
    RxRequest, RxResponse, TX_SLOT_SIZE, TxRequest, TxResponse,
};
use pvio_sim::LocalDomain;
use pvio_sim::local::memory::LocalMapping;
use std::time::Duration;

#[derive(Arbitrary, Debug)]
struct Input {
    features: u8,
    headroom: Option<u16>,
    hashes: Option<u8>,
    steers: bool,
    actions: Vec<Action>,
}

#[derive(Arbitrary, Debug)]
enum Action {
    Send {
        len: u16,
        blank: bool,
        gso: Option<(u16, bool)>,
        v6: bool,
    },
    Group {
        group: [u8; 6],
        joins: bool,
    },
    GroupAnswer,
    Receive,
    Publish,
    Sleep,
    Room(u16),
    Control,
    Steer(bool),
    Unstage,
    Clock(u16),
    /// The backend completes a posted buffer, with the right id.
    Deliver {
        offset: u16,
        flags: u8,
        status: i16,
    },
    /// An extra segment, or anything.
    Raw([u8; 8]),
    PublishRx,
    /// The backend completes a transmit request.
    Sent {
        id: Option<u16>,
        status: i8,
    },
    PublishTx,
    /// The backend answers a control request.
    Answer {
        id: Option<u16>,
        kind: Option<u16>,
        status: u8,
        data: u32,
    },
    ScribbleTx(Scribble),
    ScribbleRx(Scribble),
    ScribbleControl(Scribble),
}

type Mapping = BackRing<LocalMapping>;

struct Back {
    tx: Mapping,
    rx: Mapping,
    control: Mapping,
    pages: [LocalMapping; 3],
}

fuzz_target!(|input: Input| {
    let domains = Domains::default();
    let mut queues = vec![Queue::new(&domains.front, BACK).expect("enough memory")];
    let bit = |at: u8| input.features >> at & 1 == 1;
    queues[0].set_features(Features {
        sg: !bit(0),
        checksum_v4: !bit(1),
        checksum_v6: !bit(2),
        gso_v4: bit(3),
        gso_v6: bit(4),
        takes_gso_v4: bit(5),
        takes_gso_v6: bit(6),
    });
    if let Some(headroom) = input.headroom {
        queues[0].take_headroom(headroom);
    }
    if let Some(types) = input.hashes {
        queues[0].take_hashes(HashTypes::from_bits_truncate(types.into()));
    }
    let mut control = Control::new(&domains.front, BACK).expect("enough memory");
    if !bit(7) {
        control = control.without_staging();
    }
    if input.steers {
        control.steer(Some(steering()), 1);
    }
    let map = |gref| domains.back.map(FRONT, &[gref], Access::ReadWrite).expect("granted");
    let grefs = [queues[0].tx_gref(), queues[0].rx_gref(), control.ring_gref()];
    let [tx, rx, ctrl] = grefs.map(map);
    let mut back = Back {
        tx: BackRing::attach(tx, TX_SLOT_SIZE).expect("a valid ring"),
        rx: BackRing::attach(rx, RX_SLOT_SIZE).expect("a valid ring"),
        control: BackRing::attach(ctrl, CTRL_SLOT_SIZE).expect("a valid ring"),
        pages: grefs.map(map),
    };
    let channels = [queues[0].channel().port(), control.channel().port()]
        .map(|port| domains.back.bind_interdomain(FRONT, port).expect("a port"));

    let mut fault = None;
    for action in input.actions {
        act(action, &mut queues, &mut control, &mut back);
        let now = queues[0].fault();
        assert!(fault.is_none() || fault == now, "{fault:?} became {now:?}");
        fault = now;
    }
    channels.iter().for_each(|channel| channel.notify().expect("the domains are alive"));
    drop((back, channels));
    for queue in queues {
        assert!(queue.dismantle().is_ok(), "the backend has unmapped everything");
    }
    drop(control);
    domains.assert_frontend_is_empty();
    domains.assert_backend_is_empty();
});

fn steering() -> Steering {
    Steering::new(HashTypes::all(), &[7; 40]).expect("a valid key")
}

fn act(
    action: Action,
    queues: &mut [Queue<LocalDomain>],
    control: &mut Control<LocalDomain>,
    back: &mut Back,
) {
    let queue = &mut queues[0];
    match action {
        Action::Send { len, blank, gso, v6 } => {
            let mut frame = vec![0; 12];
            frame.extend(if v6 { [0x86, 0xdd, 0x60] } else { [8, 0, 0x45] });
            frame.resize(usize::from(len), 6);
            let _ = match gso {
                Some((size, v6)) => {
                    let kind = if v6 { GsoKind::TcpV6 } else { GsoKind::TcpV4 };
                    queue.send_gso(&frame, Gso { size, kind })
                }
                None => queue.send(&frame, if blank { Checksum::Blank } else { Checksum::Unknown }),
            };
        }
        Action::Group { group, joins } => drop(queue.tell_group(group, joins)),
        Action::GroupAnswer => drop(queue.group_answer()),
        Action::Receive => {
            let got = queue.receive_packet(|mut packet| {
                let len = packet.frame().len();
                assert!((14..=65_553).contains(&len), "a frame of {len} bytes");
                assert_eq!(packet.with_headroom().len() - packet.headroom(), len);
                len
            });
            if let Ok(Some(_)) = got {
                assert_eq!(queue.fault(), None);
            }
        }
        Action::Publish => drop(queue.publish()),
        Action::Sleep => drop((queue.final_check(), queue.has_work(), control.final_check())),
        Action::Room(pages) => drop(queue.has_room(pages.into())),
        Action::Control => drop(control.step(queues)),
        Action::Steer(on) => control.steer(on.then(steering), 1),
        Action::Unstage => control.unstage(),
        Action::Clock(seconds) => control.set_clock(Duration::from_secs(seconds.into())),
        Action::Deliver { offset, flags, status } => {
            if let Ok(Some(mut slot)) = back.rx.pop() {
                let id = RxRequest::read(&mut slot).expect("whole slots").id;
                let small =
                    |value: u16, most: u16| if value < 0xf000 { value % most } else { value };
                let status = if status > 0 { small(status as u16, 4200) as i16 } else { status };
                let flags = RxFlags::from_bits_truncate(flags.into());
                let response = RxResponse { id, offset: small(offset, 4097), flags, status };
                let _ = back.rx.push(&response.to_bytes());
            }
        }
        Action::Raw(bytes) => {
            if let Ok(Some(_)) = back.rx.pop() {
                let _ = back.rx.push(&bytes);
            }
        }
        Action::PublishRx => drop(back.rx.publish()),
        Action::Sent { id, status } => {
            if let Ok(Some(mut slot)) = back.tx.pop() {
                let own = TxRequest::read(&mut slot).expect("whole slots").id;
                let response = TxResponse { id: id.unwrap_or(own), status: status.into() };
                let _ = back.tx.push(&response.to_bytes());
            }
        }
        Action::PublishTx => drop(back.tx.publish()),
        Action::Answer { id, kind, status, data } => {
            if let Ok(Some(mut slot)) = back.control.pop() {
                let request = CtrlRequest::read(&mut slot).expect("whole slots");
                let response = CtrlResponse {
                    id: id.unwrap_or(request.id),
                    kind: kind.unwrap_or(request.kind),
                    status: u32::from(status % 5),
                    data,
                };
                let _ = back.control.push(&response.to_bytes()).map(|()| back.control.publish());
            }
        }
        Action::ScribbleTx(scribble) => scribble.write(&back.pages[0]),
        Action::ScribbleRx(scribble) => scribble.write(&back.pages[1]),
        Action::ScribbleControl(scribble) => scribble.write(&back.pages[2]),
    }
}
