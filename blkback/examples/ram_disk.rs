//! A backend with a RAM disk: one queue of a vbd, served for a frontend in the same thread.
//!
//! ```console
//! $ cargo run -p pvio-blkback --example ram_disk
//! ```

use pvio_blkback::engine::mem::MemEngine;
use pvio_blkback::{BlockEngine, Progress, Queue, test_utils};
use pvio_blkfront::{Op, Queue as Frontend, Shape};
use pvio_event_channel::{DomId, EventChannel};
use pvio_ring::proto::blkif::Status;
use pvio_sim::LocalMachine;
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    // A platform with two domains in one address space. On Xen it is `pvio_xen_linux::XenDomain`.
    let machine = LocalMachine::new();
    let (driver, guest) = (DomId(1), DomId(2));
    let mut front = Frontend::with_shape(machine.domain(guest), driver, 51712, Shape::LEAST)?;

    // Ring references and event channel reach a backend through xenstore; here they are at hand.
    let (ring, port) = (front.ring_grefs(), front.channel().port());
    let disk = MemEngine::zeroed(2048);
    let parts = test_utils::connect(machine.domain(driver), guest, ring, port, disk.geometry())?;
    let mut back = Queue::new(parts, disk);

    let slot = front.reserve().ok_or("no free slot")?;
    let mut submit = |op, buffer: &mut [u8]| -> Result<(), Box<dyn Error>> {
        front.fill(slot, 0, buffer).ok_or("beyond the slot's buffer")?;
        front.start(slot, op)?;
        front.publish()?;
        // A worker polls until there is no progress, then waits for its event channel.
        while back.poll(32)? == Progress::Some {}
        let mut status = None;
        front.poll(|_, _, completed| status = Some(completed))?;
        assert_eq!(status, Some(Status::Okay));
        front.fetch(slot, 0, buffer).ok_or("beyond the slot's buffer")?;
        Ok(())
    };
    submit(Op::Write { sector: 8, bytes: 4096 }, &mut [0x5a; 4096])?;
    let mut buffer = [0; 4096];
    submit(Op::Read { sector: 8, bytes: 4096 }, &mut buffer)?;
    assert_eq!(buffer, [0x5a; 4096]);
    Ok(())
}
