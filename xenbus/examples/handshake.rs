//! A disk from its creation to the features that both sides have agreed on. The toolstack, the backend
//! and the frontend are three connections to a xenstore in the same program.
//!
//! ```console
//! $ cargo run -p pvio-xenbus --example handshake
//! ```

use pvio_ring::DomId;
use pvio_xenbus::handshake::common::{self, BackendKind, DeviceAddr};
use pvio_xenbus::handshake::vbd::{self, BackOffer};
use pvio_xenbus::{XenbusState, Xenstore, transaction};
use pvio_xenstored::{LocalClient, Store};
use std::cell::RefCell;
use std::rc::Rc;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (driver, guest) = (DomId(1), DomId(2));
    let store = Rc::new(RefCell::new(Store::default()));

    // The toolstack, in dom0, creates the domains and the device: 51712 is xvda.
    let mut dom0 = LocalClient::connect(&store, DomId::DOM0);
    common::create_domain(&mut dom0, driver, "driver")?;
    common::create_domain(&mut dom0, guest, "guest")?;
    let addr = DeviceAddr::new(BackendKind::Vbd, driver, guest, 51712);
    vbd::create_device(&mut dom0, addr, &vbd::ToolstackBack::new(addr, "/srv/disk.img"))?;

    // The frontend waits for a state in which the backend has advertised its features.
    let mut front = LocalClient::connect(&store, guest);
    let device = vbd::ToolstackFront::read(&mut front, &addr.frontend_path())?;
    front.watch(&common::state_path(&device.backend), "backend")?;
    while front.poll_event()?.is_some() {}
    assert_eq!(common::read_state(&mut front, &device.backend)?, XenbusState::Initialising);

    // The backend finds the device. Its features and its state become visible together.
    let mut back = LocalClient::connect(&store, driver);
    for device in common::list_backends(&mut back, BackendKind::Vbd, driver)? {
        let offer = BackOffer { max_queues: Some(4), flush: true, ..BackOffer::default() };
        transaction(&mut back, |tx| {
            offer.write(tx, &device.backend_path())?;
            common::write_state(tx, &device.backend_path(), XenbusState::InitWait)
        })?;
    }

    // An event names a watch and no value: the frontend reads the state again.
    let event = front.poll_event()?.ok_or("no event")?;
    assert_eq!(event.token, "backend");
    assert_eq!(common::read_state(&mut front, &device.backend)?, XenbusState::InitWait);
    let offer = BackOffer::read(&mut front, &device.backend)?;
    assert!(offer.flush && offer.max_queues == Some(4));
    Ok(())
}
