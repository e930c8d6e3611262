//! A block frontend: attaches to a disk, writes and reads it. The hosted hypervisor and the backend run in
//! the same process, so that the example needs no Xen.
//!
//! ```console
//! $ cargo run -p pvio-blkfront --features std --example disk
//! ```

use pvio_blkback::Vbd;
use pvio_blkfront::Op;
use pvio_blkfront::session::Session;
use pvio_hosted::{Domain, DomainConfig, Hypervisor};
use pvio_ring::proto::blkif::Status;
use pvio_storage::host::ImageServer;
use pvio_xenbus::Xenstore;
use pvio_xenbus::driver::{BackendDriver, Life};
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr, request_removal};
use pvio_xenbus::handshake::vbd::{ToolstackBack, create_device};
use std::error::Error;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

fn main() -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let hypervisor = Hypervisor::start(dir.path())?;
    let driver = hypervisor.create_domain(DomainConfig::new("driver"))?;
    let guest = hypervisor.create_domain(DomainConfig::new("guest"))?;

    // The toolstack creates the device: 51712 is xvda, and the image is memory.
    let addr = DeviceAddr::new(BackendKind::Vbd, driver, guest, 51712);
    let mut toolstack = hypervisor.xenstore()?;
    let image = ToolstackBack { kind: "qdisk".into(), ..ToolstackBack::new(addr, "ram:1M") };
    create_device(&mut toolstack, addr, &image)?;

    let backend = Domain::join(dir.path(), driver)?;
    let backend = thread::spawn(move || serve(backend, addr).map_err(|error| error.to_string()));

    // The guest. These requests block; `disk.queue()` returns the queue for non-blocking requests.
    let domain = Domain::join(dir.path(), guest)?;
    let xenstore = domain.xenstore()?;
    let mut disk = Session::attach(domain, xenstore, addr, Duration::from_secs(20))?;
    assert_eq!(disk.size(), 1 << 20);
    let queue = disk.queue()?;
    let slot = queue.reserve().ok_or("no free slot")?;
    queue.fill(slot, 0, &[0x5a; 512]).ok_or("beyond the slot's buffer")?;
    queue.start(slot, Op::Write { sector: 3, bytes: 512 })?;
    queue.publish()?;
    while disk.answers(|_, _, status| assert_eq!(status, Status::Okay))? == 0 {}
    let mut sectors = [0; 1024];
    disk.read_at(2 * 512, &mut sectors)?;
    assert!(sectors[..512] == [0; 512] && sectors[512..] == [0x5a; 512]);

    disk.close()?;
    request_removal(&mut toolstack, addr)?;
    Ok(backend.join().expect("the backend does not panic")?)
}

/// Serves the disk until the toolstack removes it.
fn serve(domain: Domain, addr: DeviceAddr) -> Result<(), Box<dyn Error>> {
    let mut xenstore = domain.xenstore()?;
    let server = ImageServer::new(Arc::new(|| ()));
    let mut device = BackendDriver::restarted(addr, Vbd::new(domain, server));
    while device.step(&mut xenstore)? == Life::Alive {
        xenstore.wait_event(Some(Duration::from_millis(20)))?;
    }
    Ok(())
}
