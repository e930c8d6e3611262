//! Compile-time check: every device accepts this domain as its platform, and every queue can be
//! sent to its own thread.

use pvio_blkback::Vbd;
use pvio_blkfront::blocking::BlockingDisk;
use pvio_event_channel::DevicePlatform;
use pvio_netback::Vif;
use pvio_netfront::Nic;
use pvio_ports::host::NicServer;
use pvio_ring::shm::SharedMemory;
use pvio_storage::host::ImageServer;
use pvio_xen_linux::{Channel, Mapping, Pages, XenDomain};
use pvio_xenbus::client::Client;
use pvio_xenbus::driver::{BackendClass, FrontendClass};
use std::os::fd::AsFd;

fn thread_safe<T: Send + Sync + 'static>() {}
fn memory<T: SharedMemory + Send + 'static>() {}
fn waitable<T: AsFd>() {}
fn backend<T: BackendClass>() {}
fn frontend<T: FrontendClass>() {}
fn device<T: DevicePlatform>() {}

#[test]
fn xen_domain_implements_all_device_traits() {
    thread_safe::<XenDomain>();
    thread_safe::<Channel>();
    thread_safe::<Mapping>();
    thread_safe::<Pages>();
    memory::<Mapping>();
    memory::<Pages>();
    waitable::<Channel>();
    backend::<Vbd<ImageServer<XenDomain>>>();
    backend::<Vif<NicServer<XenDomain>>>();
    frontend::<pvio_blkfront::Disk<XenDomain>>();
    frontend::<Nic<XenDomain>>();
    device::<XenDomain>();
    let _ = BlockingDisk::<XenDomain, Client>::attach;
}
