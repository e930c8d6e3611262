//! A block frontend: attaches to a disk, writes and reads it. The hosted hypervisor and the backend run in
//! the same process, so that the example needs no Xen.
//!
//! ```console
//! $ cargo run -p pvio-blkfront --features std --example disk
//! ```

use pvio_blkback::Vbd;
use pvio_blkfront::Op;
use pvio_blkfront::blocking::BlockingDisk;
use pvio_hosted::{Domain, DomainConfig, Hypervisor};
use pvio_storage::host::ImageServer;
use pvio_xenbus::driver::BackendDriver;
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr, request_removal};
use pvio_xenbus::handshake::vbd::{ToolstackBack, create_device};
use pvio_xenbus::test_utils;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let hypervisor = Hypervisor::start(dir.path())?;
    let driver = hypervisor.create_domain(DomainConfig::new("driver"))?;
    let guest = hypervisor.create_domain(DomainConfig::new("guest"))?;

    // The toolstack creates the device: 51712 is xvda, and the image is memory.
    let addr = DeviceAddr::new(BackendKind::Vbd, driver, guest, 51712);
    let mut toolstack = hypervisor.xenstore()?;
    let image = ToolstackBack { kind: "qdisk".into(), ..ToolstackBack::new(addr, "ram:1M") };
    create_device(&mut toolstack, addr, &image)?;

    let domain = Domain::join(dir.path(), driver)?;
    let xenstore = domain.xenstore()?;
    let server = ImageServer::new(domain, Arc::new(|| ()));
    let backend = BackendDriver::restarted(addr, Vbd::new(server));
    let backend = thread::spawn(move || test_utils::serve(backend, xenstore));

    // The guest. `read_at` blocks; the requests of `disk.queue()` do not.
    let domain = Domain::join(dir.path(), guest)?;
    let xenstore = domain.xenstore()?;
    let mut disk = BlockingDisk::attach(domain, xenstore, addr, Duration::from_secs(20))?;
    let queue = disk.queue()?;
    let slot = queue.reserve().ok_or("no free slot")?;
    queue.fill(slot, 0, &[0x5a; 512]).ok_or("beyond the slot's buffer")?;
    queue.start(slot, Op::Write { sector: 3, bytes: 512 })?;
    queue.publish()?;
    while disk.answers(|_, _, _| ())? == 0 {}
    let mut sector = [0; 512];
    disk.read_at(3 * 512, &mut sector)?;
    assert_eq!(sector, [0x5a; 512]);

    disk.close()?;
    request_removal(&mut toolstack, addr)?;
    Ok(backend.join().expect("the backend does not panic")?)
}
