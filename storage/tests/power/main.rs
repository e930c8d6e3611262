//! The state of a disk after a power loss.
//!
//! | module | contents |
//! |---|---|
//! | [`ext4`] | the disk as the kernel's ext4 reads it |
//! | [`sectors`] | every sector of the disk, in images of every format |
//! | [`files`] | recording of the changes that reach storage |

mod ext4;
mod files;
#[path = "../support/fuse.rs"]
mod fuse;
mod sectors;
#[path = "../support/mod.rs"]
mod support;

use ext4::{Fact, Mounted};
use files::{DiskFile, HostFile};
use fuse::{OneFile, put};
use pvio_blkback::engine::Geometry;
use pvio_blkback::queue::{QueueFault, QueueParts};
use pvio_blkback::session::{
    Begin, QueueServer, Session, SessionIdentity, SessionParts, SessionSpec,
};
use pvio_blkback::vbd::VbdServer;
use pvio_event_channel::EventChannels;
use pvio_grant_table::policy::MappingBudget;
use pvio_hosted::Domain;
use pvio_ring::shm::{HeapMemory, PAGE_SIZE};
use pvio_storage::engine::record::Record;
use pvio_storage::image::{Image, ImageOptions};
use pvio_storage::worker::{self, Worker};
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::common::DeviceAddr;
use pvio_xenbus::handshake::vbd::{Backing, Mode, ToolstackBack};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::task::Poll;
use support::{Guest, Machine, has, text, tool};

/// Serializes the tests: a program that one starts inherits for a moment what another has mounted.
static TURN: Mutex<()> = Mutex::new(());

/// Bytes of a guest's disk.
const SIZE: u64 = 16 << 20;

/// Serves raw images whose changes are recorded.
struct Recording {
    domain: Domain,
    record: Arc<Record>,
    image: Option<Arc<Image>>,
}

/// Serves the queues of such an image.
struct Queues(Arc<Image>);

impl VbdServer for Recording {
    type Session = Session<Domain, HeapMemory, Queues>;

    fn open(&mut self, disk: &ToolstackBack) -> Result<Geometry, Fault> {
        let Backing::Format("raw", path) = disk.backing() else { panic!("{disk:?}") };
        let image = Image::open(Path::new(OsStr::from_bytes(path)), ImageOptions::default());
        let image = image.map_err(|e| Fault::of(e.code(), &e))?.recorded(self.record.clone());
        let geometry = image.geometry();
        self.image = Some(Arc::new(image));
        Ok(geometry)
    }

    fn resumable(&mut self, _: &SessionIdentity) -> Result<(), Fault> {
        Err(Fault::new("record-missing", "records are not stored"))
    }

    fn start(&mut self, spec: &SessionSpec, begin: Begin) -> Result<Self::Session, Fault> {
        let image = self.image.clone().unwrap();
        let parts = SessionParts {
            platform: self.domain.clone(),
            record: HeapMemory::pages(spec.identity.record_len()?.div_ceil(PAGE_SIZE)),
            flush_state: Arc::clone(image.flush_state()),
            mapping_budget: MappingBudget::unlimited(),
            stats: Vec::new(),
            queues: Queues(image),
        };
        Session::start(spec, begin, parts)
    }

    fn ready(&mut self, session: &mut Self::Session) -> Result<Poll<()>, Fault> {
        session.ready()
    }

    fn fault(&mut self, session: &mut Self::Session) -> Option<Fault> {
        session.fault()
    }

    fn resize(&mut self, session: &mut Self::Session, sectors: u64) {
        session.resize(sectors);
    }

    fn stop(&mut self, session: &mut Self::Session) -> Poll<()> {
        session.stop()
    }

    fn end(&mut self, _: DeviceAddr) {}
}

impl QueueServer<Domain, HeapMemory> for Queues {
    type Running = Worker;

    fn start(
        &mut self,
        name: &str,
        parts: QueueParts<Domain, <Domain as EventChannels>::Channel>,
    ) -> Result<Worker, Fault> {
        Ok(worker::start(name, parts, Arc::clone(&self.0), Arc::new(|| ())).unwrap())
    }

    fn fault(&mut self, running: &mut Worker) -> Option<QueueFault> {
        running.fault()
    }
}

/// Lets ext4 work on a guest's disk.
fn work(guest: Guest, dir: &Path, record: &Record) -> Vec<Fact> {
    let fuse = dir.join("fuse");
    fs::create_dir(&fuse).unwrap();
    let file = DiskFile(Mutex::new(guest));
    let session = fuser::spawn_mount(OneFile(file), &fuse, &fuser::Config::default()).unwrap();
    let facts = {
        let mounted = Mounted::new(&fuse.join("disk"), &dir.join("mnt"));
        ext4::work(&mounted.0, record)
    };
    session.umount_and_join().unwrap();
    facts
}

#[test]
fn synced_data_on_raw_disk_survives_power_loss_at_any_moment() {
    if !ext4::can_mount() {
        return;
    }
    let _turn = TURN.lock();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    ext4::make(&image, SIZE);
    let begin = fs::read(&image).unwrap();
    let record = Arc::new(Record::default());
    let recorded = record.clone();
    let server = move |domain| Recording { domain, record: recorded, image: None };
    let params = format!("raw:{}", text(&image));
    let guest = Machine::new().disk_of(&params, Mode::ReadWrite, server);
    let facts = work(guest, dir.path(), &record);
    ext4::lose_power(dir.path(), &record, &facts, &mut |moment, loss, after| {
        let mut disk = begin.clone();
        record.after_power_loss(&mut disk, moment, loss);
        fs::write(after, &disk).unwrap();
    });
}

#[test]
fn synced_data_in_qcow2_image_survives_power_loss_at_any_moment() {
    if !ext4::can_mount() || !has("qemu-img", "qemu-utils") {
        return;
    }
    let _turn = TURN.lock();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    ext4::make(&path("disk.img"), SIZE);
    let options = ["convert", "-O", "qcow2", "-o", "cluster_size=4k"];
    let (from, to) = (path("disk.img"), path("disk.qcow2"));
    tool("qemu-img", &[&options[..], &[text(&from), text(&to)]].concat());
    let begin = fs::read(&to).unwrap();
    // Physical sectors of 4 KiB are advertised to the guest, and used in the raw disk's record
    // above. Storage that tears smaller ones may tear ext4's superblock of 1 KiB, which no ext4 can
    // mount then.
    let record = Arc::new(Record::with_sectors(4096));
    let host = path("host");
    fs::create_dir(&host).unwrap();
    let file = HostFile::new(begin.clone(), record.clone());
    let session = fuser::spawn_mount(OneFile(file), &host, &fuser::Config::default()).unwrap();
    let guest =
        Machine::new().disk(&format!("qcow2:{}", text(&host.join("disk"))), Mode::ReadWrite);
    let facts = work(guest, dir.path(), &record);
    session.umount_and_join().unwrap();
    ext4::lose_power(dir.path(), &record, &facts, &mut |moment, loss, after| {
        let mut file = begin.clone();
        record.surviving_writes(moment, loss, &mut |at, data| put(&mut file, at, data));
        let image = path("left.qcow2");
        fs::write(&image, &file).unwrap();
        let disk = sectors::served(&format!("qcow2:{}", text(&image)), SIZE);
        sectors::is_sound(&image, &format!("{moment} {loss:?}"));
        fs::write(after, disk).unwrap();
    });
}
