//! A disk in memory, through the whole path.
#![cfg(feature = "std")]

mod support;

use pvio_blkback::engine::ram::RamDisk;
use pvio_ring::proto::blkif::Status;
use pvio_xenbus::handshake::vbd::Mode;
use support::{Deed, Machine, workload};

#[test]
fn it_keeps_what_a_guest_writes_and_refuses_what_it_may_not() {
    let mut guest = Machine::new().disk("ram:16M", Mode::ReadWrite);
    let mut model = vec![0; 16 << 20];
    workload(&mut guest, &mut model, 1, 60, true);
    assert!(guest.everything() == model);
    guest.close();

    let mut guest = Machine::new().disk("ram:1M", Mode::ReadOnly);
    assert_eq!(guest.all(&[Deed::Write(0, vec![1; 512])])[0].0, Status::Error);
    assert!(guest.everything().iter().all(|b| *b == 0));
    guest.close();
}

#[test]
fn what_was_never_written_takes_no_memory() {
    let disk = RamDisk::new(64 << 30).expect("its index fits");
    assert_eq!(disk.geometry(false).sectors, 1 << 27);
    assert_eq!(disk.resident(), 0);
    assert!(RamDisk::new(u64::MAX).is_none());
}
