//! Model of the messages between queues, in every interleaving (`cargo xtask test loom`). A queue
//! sleeps whenever it may: a lost wake-up is a deadlock.

use super::*;
use crate::port::{Checksum, Offload};
use alloc::boxed::Box;
use loom::sync::Notify;
use loom::thread;

type Buf = Box<[u8]>;

/// A vif of two queues, and what each of them waits for.
struct Vif {
    set: Arc<QueueSet<Buf>>,
    events: [Arc<Notify>; 2],
}

impl Vif {
    fn new() -> Self {
        let events = [Arc::new(Notify::new()), Arc::new(Notify::new())];
        let waker = |event: &Arc<Notify>| -> Waker {
            let event = Arc::clone(event);
            Arc::new(move || event.notify())
        };
        Self { set: QueueSet::new(events.each_ref().map(waker)), events }
    }

    fn queue(&self, index: usize) -> Queue {
        let link = Link::new(&self.set, index).unwrap();
        Queue { link, event: Arc::clone(&self.events[index]) }
    }
}

struct Queue {
    link: Link<Buf>,
    event: Arc<Notify>,
}

impl Queue {
    /// Sleeps if there is nothing to do.
    fn sleep(&self) {
        if self.link.final_check() {
            // A deferred packet: the queue polls.
            thread::yield_now();
        } else {
            self.event.wait();
        }
    }
}

fn arrival(number: u8) -> Arrival<Buf> {
    let offload = Offload { checksum: Checksum::Validated, gso: None };
    let packet = Packet { buf: Box::from([number]), start: 0, len: 1, offload };
    Arrival { packet, hash: None, owner: 0 }
}

fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(model);
}

fn command() -> StagingCommand {
    let request = CtrlRequest { id: 7, kind: 0, data: [0; 3] };
    StagingCommand { request, queue: 1, page: GrantRef(1), list: Vec::new(), adds: true }
}

#[test]
fn packet_steered_to_a_sleeping_queue_wakes_it() {
    check(|| {
        let vif = Vif::new();
        let (mut first, second) = (vif.queue(0), vif.queue(1));
        let second = thread::spawn(move || {
            loop {
                if let Some(arrival) = second.link.next_arrival() {
                    return arrival.packet.buf[0];
                }
                second.sleep();
            }
        });
        assert!(matches!(first.link.pass(1, arrival(9)), Steered::Passed));
        assert_eq!(second.join().unwrap(), 9);
    });
}

#[test]
fn packets_beyond_inbox_and_lent_buffers_all_arrive_in_order() {
    const PACKETS: u8 = 3;
    check(|| {
        let vif = Vif::new();
        let (mut first, second) = (vif.queue(0), vif.queue(1));
        let second = thread::spawn(move || {
            let mut taken = 0;
            while taken < PACKETS {
                match second.link.next_arrival() {
                    Some(arrival) => {
                        assert_eq!(arrival.packet.buf[0], taken, "order of packets");
                        taken += 1;
                        second.link.return_buffer(arrival.owner, arrival.packet.buf);
                    }
                    None => second.sleep(),
                }
            }
        });
        let mut buffers = 0;
        for number in 0..PACKETS {
            let mut steered = first.link.pass(1, arrival(number));
            while !matches!(steered, Steered::Passed) {
                assert!(matches!(steered, Steered::Deferred));
                buffers += core::iter::from_fn(|| first.link.next_returned()).count();
                first.sleep();
                steered = first.link.retry().unwrap();
            }
        }
        second.join().unwrap();
        buffers += core::iter::from_fn(|| first.link.next_returned()).count();
        assert_eq!(buffers, usize::from(PACKETS), "each buffer returns once");
    });
}

#[test]
fn staging_command_is_executed_and_its_result_reported() {
    check(|| {
        let vif = Vif::new();
        let (first, second) = (vif.queue(0), vif.queue(1));
        let second = thread::spawn(move || {
            loop {
                if let Some(command) = second.link.next_command() {
                    let status = CtrlStatus::Success;
                    return second.link.report(StagingResult { command, status, data: 3 });
                }
                second.sleep();
            }
        });
        assert!(first.link.set().send(command()));
        let result = loop {
            match first.link.next_result() {
                Some(result) => break result,
                None => first.sleep(),
            }
        };
        assert_eq!((result.command.request.id, result.data), (7, 3));
        second.join().unwrap();
    });
}
