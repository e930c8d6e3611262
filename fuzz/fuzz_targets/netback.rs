//! A queue of a virtual NIC with a hostile frontend: transmit and receive rings.
//!
//! Transmit responses are in the order of the requests, no buffer of the port is lost, and one call moves
//! no more packets than its budget, whatever the frontend does.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pvio_event_channel::EventChannel;
use pvio_fuzz::nic::{Back, Bits, DEPTH, Frame, Guest, TxSlot, assert_no_buffer_lost};
use pvio_fuzz::{Domains, FRONT, Scribble, write_somewhere};
use pvio_netback::port::{NetPort, memory::pair};
use pvio_netback::queue::Policy;
use pvio_xenbus::handshake::vif::VifRate;
use std::sync::Arc;
use std::time::Duration;

#[derive(Arbitrary, Debug)]
struct Input {
    features: Bits,
    /// First index of both rings.
    start: Start,
    split: bool,
    map: bool,
    actions: Vec<Action>,
}

#[derive(Arbitrary, Debug)]
enum Start {
    Zero,
    BeforeWrap(u8),
}

#[derive(Arbitrary, Debug)]
enum Action {
    Send(Vec<TxSlot>),
    /// A slot that may be an extra segment.
    SendRaw([u8; 12]),
    /// A packet with an extra segment.
    SendExtra {
        first: TxSlot,
        kind: u8,
        more: bool,
        rest: [u8; 6],
        second: TxSlot,
    },
    Post {
        count: u8,
        gref: u16,
    },
    PostRaw([u8; 8]),
    Publish,
    ScribbleTx(Scribble),
    ScribbleRx(Scribble),
    Overwrite {
        at: u16,
        value: [u8; 16],
    },
    Revoke(u8),
    Notify(bool),
    /// A packet arrives from the network.
    Arrive(Frame),
    /// The network takes what was sent.
    Drain,
    Poll(u8),
    Sleep,
    Tick(u16),
    Limit(Option<u16>),
    Headroom(u16),
    Filter(bool),
    Unblock,
}

fuzz_target!(|input: Input| {
    let domains = Domains::default();
    let start = match input.start {
        Start::Zero => 0,
        Start::BeforeWrap(distance) => u32::MAX - u32::from(distance),
    };
    let mut guest = Guest::new(&domains, start, input.split);
    let back = domains.back.clone();
    let features = input.features.features();
    let mut queue =
        Back::attach(back, FRONT, &guest.refs, features, Arc::default()).expect("a valid ring");
    queue.set_policy(if input.map { Policy::Map } else { Policy::Copy });
    let (mut port, mut wire) = pair(DEPTH);
    let mut now = Duration::ZERO;

    for action in input.actions {
        match action {
            Action::Send(slots) => slots.into_iter().for_each(|slot| guest.send_slot(slot)),
            Action::SendRaw(bytes) => guest.send_raw(bytes, None),
            Action::SendExtra { first, kind, more, rest, second } => {
                guest.send_slot(first);
                let mut bytes = [0; 12];
                (bytes[0], bytes[1]) = (kind % 7, more.into());
                bytes[2..8].copy_from_slice(&rest);
                guest.send_raw(bytes, None);
                guest.send_slot(second);
            }
            Action::Post { count, gref } => guest.post(count, gref),
            Action::PostRaw(bytes) => drop(guest.rx.push(&bytes)),
            Action::Publish => drop((guest.tx.publish(), guest.rx.publish())),
            Action::ScribbleTx(scribble) => {
                guest.honest = false;
                scribble.write(&guest.tx_page.pages);
            }
            Action::ScribbleRx(scribble) => {
                guest.honest = false;
                scribble.write(&guest.rx_page.pages);
            }
            Action::Overwrite { at, value } => write_somewhere(&guest.data.pages, at, &value),
            Action::Revoke(which) => {
                let fixed = guest.data.grefs.pop();
                guest.data.revoke(which);
                guest.data.grefs.extend(fixed);
            }
            Action::Notify(rx) => {
                let last = guest.channels.len() - 1;
                guest.channels[usize::from(rx).min(last)].notify().expect("the domain is alive");
            }
            Action::Arrive(frame) => frame.inject(&mut wire),
            Action::Drain => {
                while let Some(packet) = wire.receive() {
                    assert!(
                        !packet.frame().is_empty() && packet.frame().len() <= 65535,
                        "a frame's size"
                    );
                    wire.recycle(packet.buf);
                }
                queue.unblock();
            }
            Action::Poll(budget) => {
                if queue.take_events().is_ok()
                    && let Ok(progress) = queue.poll(&mut port, budget.into())
                {
                    let most = usize::from(budget);
                    assert!(progress.tx <= most && progress.rx <= most, "{progress:?} of {budget}");
                }
                guest.take_tx_responses();
                guest.take_rx_responses();
            }
            Action::Sleep => drop(queue.final_check()),
            Action::Tick(millis) => {
                now += Duration::from_millis(millis.into());
                queue.set_clock(now);
                if let Some(deadline) = queue.deadline() {
                    assert!(
                        deadline < now + Duration::from_secs(3600),
                        "a deadline in {deadline:?}"
                    );
                }
                let _ = queue.tick(&mut port);
            }
            Action::Limit(rate) => {
                let rate = rate.map(|bytes| VifRate { bytes: bytes.into(), usec: 50_000 });
                queue.limit().set(rate);
            }
            Action::Headroom(bytes) => queue.headroom().set(bytes),
            Action::Filter(chosen) => queue.groups().set_filter(chosen),
            Action::Unblock => queue.unblock(),
        }
    }

    // All that an honest frontend sent is answered once the rate permits it.
    let _ = guest.tx.publish();
    queue.limit().set(None);
    for round in 0.. {
        while let Some(packet) = wire.receive() {
            wire.recycle(packet.buf);
        }
        queue.unblock();
        match queue.poll(&mut port, 64) {
            Ok(progress) if progress.any() => {}
            _ => break,
        }
        assert!(round < 600, "the queue is never idle");
    }
    guest.take_tx_responses();
    queue.drop_backlog(&mut port);
    assert_eq!(queue.backlog(), 0);
    drop(queue);
    assert_no_buffer_lost(&mut port, &mut wire);
    guest.channels.clear();
    domains.assert_backend_is_empty();
    guest.assert_released();
});
