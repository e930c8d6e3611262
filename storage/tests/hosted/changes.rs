//! Changes of attached disks: resizing, and media changes.

use crate::machine::{Machine, PATIENCE, image, on_every_path};
use crate::write;
use pvio_blkback::Config;
use pvio_blkfront::blocking::{BlockingDisk, DiskError};
use pvio_blkfront::{Op, RequestedFeatures};
use pvio_hosted::Domain;
use pvio_ring::proto::blkif::{RefusalReason, Status};
use pvio_xenbus::client::Client;
use pvio_xenbus::handshake::vbd::{
    BackDisk, DeviceType, DiskInfo, Mode, ToolstackBack, ToolstackFront, change_media,
};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// Waits until the frontend has noticed this disk size.
fn becomes(session: &mut BlockingDisk<Domain, Client>, size: u64) {
    let begin = Instant::now();
    while session.size() != size {
        assert!(
            begin.elapsed() < PATIENCE,
            "size stays {} bytes instead of {size}",
            session.size()
        );
        session.queue().unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn resized_image_file_changes_disk_size() {
    on_every_path(resized);
}

fn resized(config: Config) {
    let machine = Machine::new(config);
    let file = image(1 << 20);
    machine.add_disk(file.path(), Mode::ReadWrite);
    let driver = machine.serve();
    let mut session = machine.attach().unwrap();
    assert!(matches!(session.read_at(1 << 20, &mut [0; 512]), Err(DiskError::OutOfRange(..))));

    file.as_file().set_len(3 << 20).unwrap();
    becomes(&mut session, 3 << 20);
    write(&mut session, (3 << 11) - 8, &[0x77; 4096]);
    let mut there = [0; 4096];
    file.as_file().read_exact_at(&mut there, (3 << 20) - 4096).unwrap();
    assert_eq!(there, [0x77; 4096], "write to the added range");
    session.read_at(1 << 20, &mut [1; 512]).unwrap();

    // A partial sector at the end is ignored.
    file.as_file().set_len((2 << 20) + 511).unwrap();
    becomes(&mut session, 2 << 20);
    session.read_at(0, &mut [0; 4096]).unwrap();
    assert_eq!(session.device().sessions(), 1, "frontend keeps its session");
    let counted = driver.events.each_ref().map(|(name, log)| (*name, log.seen()));
    assert_eq!(counted, [("sessions", 1), ("resizes", 2), ("pauses", 0)]);
    session.close().unwrap();
    driver.end();
}

fn drive(machine: &Machine, params: &str) -> ToolstackBack {
    let mut back = ToolstackBack::new(machine.addr(), params);
    (back.device_type, back.removable, back.mode) = (DeviceType::Cdrom, true, Mode::ReadOnly);
    back
}

#[test]
fn removable_drive_media_is_ejected_and_inserted_while_attached() {
    on_every_path(media);
}

fn media(config: Config) {
    let machine = Machine::new(Config { max_queues: 2, ..config });
    let (first, second) = (image(1 << 20), image(3 << 19));
    let path = |file: &tempfile::NamedTempFile| file.path().to_str().unwrap().to_owned();
    let addr = machine.add(&drive(&machine, &path(&first)));
    let driver = machine.serve();
    let guest = machine.join(machine.guest);
    let own = guest.xenstore().unwrap();
    let requested = RequestedFeatures { queues: 2, ..RequestedFeatures::default() };
    let mut session =
        BlockingDisk::attach_requesting(guest, own, addr, requested, PATIENCE).unwrap();
    let mut xs = machine.xenstore();
    let holds = |session: &mut BlockingDisk<Domain, Client>, what: &tempfile::NamedTempFile| {
        let expected = std::fs::read(what.path()).unwrap();
        becomes(session, expected.len() as u64);
        let mut got = vec![0; expected.len()];
        session.read_at(0, &mut got).unwrap();
        assert!(got == expected);
    };
    holds(&mut session, &first);
    let is = DiskInfo { cdrom: true, removable: true, read_only: true };
    assert_eq!(session.device().served().unwrap().info, is);

    // From one media to another, ejected, and the same one inserted again.
    change_media(&mut xs, addr, &path(&second)).unwrap();
    holds(&mut session, &second);
    change_media(&mut xs, addr, "").unwrap();
    becomes(&mut session, 0);
    assert!(matches!(session.read_at(0, &mut [0; 512]), Err(DiskError::OutOfRange(..))));
    change_media(&mut xs, addr, &path(&second)).unwrap();
    holds(&mut session, &second);

    // Unreadable media leave the drive empty, and served.
    assert!(driver.faults.lock().unwrap().is_empty());
    change_media(&mut xs, addr, "/nowhere/disc.iso").unwrap();
    becomes(&mut session, 0);
    // Long enough for several retries.
    std::thread::sleep(Duration::from_millis(100));
    change_media(&mut xs, addr, &path(&first)).unwrap();
    holds(&mut session, &first);
    assert_eq!(*driver.faults.lock().unwrap(), ["image-missing"], "change is announced once");
    // The other queue continues as well.
    let mut second = session.take(1).unwrap().unwrap();
    let slot = second.reserve().unwrap();
    second.start(slot, Op::Read { sector: 0, bytes: 4096 }).unwrap();
    second.publish().unwrap();
    let begin = Instant::now();
    while second.poll(|_, _, status| assert_eq!(status, Status::Okay)).unwrap() == 0 {
        assert!(begin.elapsed() < PATIENCE, "no response");
    }
    session.put_back(second).unwrap();
    assert_eq!(session.device().sessions(), 1, "frontend keeps its session");
    session.close().unwrap();
    driver.end();
}

#[test]
fn empty_drive_is_attached_and_media_inserted_later() {
    let machine = Machine::new(Config::default());
    let file = image(1 << 20);
    let addr = machine.add(&drive(&machine, ""));
    let driver = machine.serve();
    let mut session = machine.attach().unwrap();
    assert_eq!(session.size(), 0);
    change_media(&mut machine.xenstore(), addr, file.path().to_str().unwrap()).unwrap();
    becomes(&mut session, 1 << 20);
    session.read_at(4096, &mut [0; 8192]).unwrap();
    session.close().unwrap();
    driver.end();
}

#[test]
fn media_change_of_fixed_disk_is_rejected() {
    let machine = Machine::new(Config::default());
    let (file, other) = (image(1 << 20), image(2 << 20));
    let addr = machine.add_disk(file.path(), Mode::ReadWrite);
    let driver = machine.serve();
    let mut session = machine.attach().unwrap();
    let (mut xs, path) = (machine.xenstore(), other.path().to_str().unwrap());
    assert!(change_media(&mut xs, addr, path).is_err());
    // A toolstack that does it nevertheless.
    ToolstackBack::new(addr, path).write(&mut xs, &addr.backend_path()).unwrap();
    let begin = Instant::now();
    while driver.faults.lock().unwrap().is_empty() {
        assert!(begin.elapsed() < PATIENCE, "no fault is reported");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(driver.faults.lock().unwrap()[0], "medium-fixed");
    session.read_at(0, &mut [0; 4096]).unwrap();
    assert_eq!(session.size(), 1 << 20);
    session.close().unwrap();
    driver.end();
}

#[test]
fn disk_over_2_tib_is_addressed_to_its_end() {
    let machine = Machine::new(Config::default());
    let file = tempfile::NamedTempFile::new().unwrap();
    // More sectors of 512 bytes than a u32 can count, almost all of them in holes.
    const SIZE: u64 = (3 << 40) + 4096;
    if let Err(error) = file.as_file().set_len(SIZE) {
        println!(
            "SKIPPED: no file of 3 TiB can be made ({error}); set TMPDIR to ext4, XFS or tmpfs"
        );
        return;
    }
    machine.add_disk(file.path(), Mode::ReadWrite);
    let driver = machine.serve();
    let mut session = machine.attach().unwrap();
    assert_eq!(session.size(), SIZE);
    write(&mut session, SIZE / 512 - 8, &[0x33; 4096]);
    // 2 TiB before it: the target of a sector number truncated to 32 bits.
    write(&mut session, SIZE / 512 - 8 - (1 << 32), &[0x44; 4096]);
    for (from_end, byte) in [(4096, 0x33), (4096 + (2 << 40), 0x44)] {
        let mut there = [0; 4096];
        file.as_file().read_exact_at(&mut there, SIZE - from_end).unwrap();
        assert_eq!(there, [byte; 4096]);
        let mut got = [0; 4096];
        session.read_at(SIZE - from_end, &mut got).unwrap();
        assert_eq!(got, [byte; 4096]);
    }
    session.close().unwrap();
    driver.end();
}

#[test]
fn disk_with_4096_byte_sectors_uses_512_byte_sector_numbers() {
    on_every_path(large_sectors);
}

fn large_sectors(config: Config) {
    let machine = Machine::new(config);
    let file = image(1 << 20);
    let mut back = ToolstackBack::new(machine.addr(), file.path().to_str().unwrap());
    back.options = Some("sector=4096,physical=16384".into());
    machine.add(&back);
    let driver = machine.serve();
    let mut session = machine.attach().unwrap();
    let disk = session.device().served().unwrap();
    assert_eq!((disk.sectors, disk.sector_size, disk.physical_sector_size), (2048, 4096, 16384));
    for (at, len) in [(512, 4096), (0, 512), (4096, 2048)] {
        let refused = session.read_at(at, &mut vec![0; len]);
        assert!(matches!(refused, Err(DiskError::OutOfRange(..))), "{len} bytes at {at}");
    }
    write(&mut session, 8, &[0x21; 8192]);
    let mut got = [0; 16384];
    session.read_at(0, &mut got).unwrap();
    assert!(got[..] == std::fs::read(file.path()).unwrap()[..16384]);
    assert_eq!(got[4096..12288], [0x21; 8192]);
    // A request of partial sectors is rejected, without affecting others.
    let before = driver.stats.refused().find(|(r, _)| *r == RefusalReason::Misaligned).unwrap().1;
    let queue = session.queue().unwrap();
    let slot = queue.reserve().unwrap();
    queue.start(slot, Op::Write { sector: 1, bytes: 4096 }).unwrap();
    queue.publish().unwrap();
    while session.answers(|_, _, status| assert_eq!(status, Status::Error)).unwrap() == 0 {}
    session.queue().unwrap().release(slot);
    let after = driver.stats.refused().find(|(r, _)| *r == RefusalReason::Misaligned).unwrap().1;
    assert_eq!(after, before + 1);
    // It grows by whole sectors.
    file.as_file().set_len((1 << 20) + 4096 + 512).unwrap();
    becomes(&mut session, (1 << 20) + 4096);
    session.close().unwrap();
    driver.end();
}

#[test]
fn untrusted_backend_gets_zeroed_buffers() {
    for trusted in [true, false] {
        let machine = Machine::new(Config::default());
        let file = image(1 << 20);
        let addr = machine.add_disk(file.path(), Mode::ReadOnly);
        let told = ToolstackFront { trusted, ..ToolstackFront::new(addr, DeviceType::Disk) };
        told.write(&mut machine.xenstore(), &addr.frontend_path()).unwrap();
        let driver = machine.serve();
        let mut session = machine.attach().unwrap();
        let queue = session.queue().unwrap();
        let slot = queue.reserve().unwrap();
        queue.fill(slot, 0, &[0x99; 4096]).unwrap();
        queue.release(slot);
        assert_eq!(queue.reserve(), Some(slot), "slot is the last released one");
        let mut seen = [1; 4096];
        queue.fetch(slot, 0, &mut seen).unwrap();
        assert_eq!(seen, if trusted { [0x99; 4096] } else { [0; 4096] });
        session.close().unwrap();
        driver.end();
    }
}

#[test]
fn features_disabled_by_toolstack_are_not_advertised() {
    for (removable, cdrom, mode, discards) in [
        (false, false, Mode::ReadWrite, true),
        (false, false, Mode::ReadWrite, false),
        (true, false, Mode::ReadWrite, true),
        (false, true, Mode::ReadOnly, true),
    ] {
        let machine = Machine::new(Config::default());
        let file = image(1 << 20);
        let mut back = ToolstackBack::new(machine.addr(), file.path().to_str().unwrap());
        (back.removable, back.mode, back.discard_enable) = (removable, mode, discards);
        back.device_type = if cdrom { DeviceType::Cdrom } else { DeviceType::Disk };
        let addr = machine.add(&back);
        let driver = machine.serve();
        let session = machine.attach().unwrap();
        let disk = BackDisk::read(&mut machine.xenstore(), &addr.backend_path()).unwrap();
        let read_only = mode == Mode::ReadOnly;
        assert_eq!(disk.info, DiskInfo { cdrom, removable, read_only });
        assert_eq!(disk.offer.discard.is_some(), discards && !read_only);
        assert_eq!((disk.sector_size, disk.physical_sector_size), (512, 4096));
        session.close().unwrap();
        driver.end();
    }
}
