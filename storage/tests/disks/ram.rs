//! A disk in memory, through the whole stack.

use crate::support::{Deed, Machine, alone, workload};
use pvio_blkback::engine::{EngineError, Io};
use pvio_ring::proto::blkif::Status;
use pvio_ring::shm::HeapMemory;
use pvio_storage::engine::ram::RamDisk;
use pvio_storage::image::{Image, ImageOptions};
use pvio_xenbus::handshake::vbd::Mode;

#[test]
fn ram_disk_stores_writes_and_rejects_them_if_read_only() {
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
fn ram_disk_allocates_no_memory_for_unwritten_data() {
    let disk = RamDisk::new(64 << 30).expect("index of the disk fits into memory");
    assert_eq!(disk.geometry(false).sectors, 1 << 27);
    assert_eq!(disk.resident(), 0);
    assert!(RamDisk::new(u64::MAX).is_none());
}

#[test]
fn secure_discard_zeroes_ram_disk_and_is_not_supported_on_files() {
    let mut guest = Machine::new().disk("ram:16M", Mode::ReadWrite);
    for i in 0..(1 << 20) / 4096 {
        guest.one(Deed::Write(i * 8, vec![7; 4096]));
    }
    // Whole pieces of memory, and a part of one.
    guest.one(Deed::SecureDiscard(128, 256));
    guest.one(Deed::SecureDiscard(1001, 3));
    let found = guest.everything();
    for (sector, found) in found.chunks(512).enumerate() {
        let gone = (128..384).contains(&sector) || (1001..1004).contains(&sector) || sector >= 2048;
        assert!(found.iter().all(|byte| *byte == if gone { 0 } else { 7 }), "{sector}");
    }
    guest.close();

    // Copies of a file's data may exist elsewhere on the device: secure discard is neither
    // advertised nor executed.
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.img");
    std::fs::write(&image, [7; 1 << 20]).unwrap();
    for params in [format!("raw:{}", image.display()), "overlay:ram:1M".into()] {
        let mut guest = Machine::new().disk(&params, Mode::ReadWrite);
        let answer = guest.all(&[Deed::SecureDiscard(0, 8)])[0].0;
        assert_eq!(answer, Status::NotSupported, "{params}");
        guest.close();
    }
    assert!(std::fs::read(&image).unwrap().iter().all(|byte| *byte == 7));
}

#[test]
fn engine_without_secure_discard_reports_unsupported() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.img");
    std::fs::write(&image, [7; 1 << 20]).unwrap();
    let raw = format!("raw:{}", image.display());
    for (spec, expected) in [
        (raw.as_str(), Err(EngineError::Unsupported)),
        ("overlay:ram:1M", Err(EngineError::Unsupported)),
        ("ram:1M", Ok(())),
    ] {
        let image = Image::open_disk(&spec.parse().unwrap(), ImageOptions::default()).unwrap();
        let mut engine = image.engine::<HeapMemory>(4).unwrap();
        let secure = Io::Discard { sector: 0, sectors: 8, secure: true };
        assert_eq!(alone(&mut engine, secure, None), expected, "{spec}");
    }
    assert!(std::fs::read(&image).unwrap().iter().all(|byte| *byte == 7));
}
