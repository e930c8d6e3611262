//! Storage that delays a write of a server which is killed: the write completes before the
//! successor opens the disk, and so never overwrites what the successor has written.

use super::fuse::can_serve_files;
use super::storage::{Mounted, SlowStorage};
use super::support::{has, text, tool};
use super::{ABI, MEMORY, Memory, PATIENCE, key};
use pvio_blkback::{DataPath, DiskState, QueueParts, QueueRecord, QueueServer, Stats, VbdServer};
use pvio_event_channel::{EventChannel, EventChannels, EventError, Port};
use pvio_grant_table::policy::MappingBudget;
use pvio_grant_table::{Access, CopyOp, DomId, GrantCopier, GrantMapper, GrantRef, GrantStatus};
use pvio_recordfile::{RecordDir, RecordFile};
use pvio_ring::FrontRing;
use pvio_ring::inflight::Record;
use pvio_ring::proto::blkif::{Response, Status};
use pvio_ring::shm::{PAGE_SIZE, Part, Region};
use pvio_storage::host::{ImageQueues, ImageServer};
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr};
use pvio_xenbus::handshake::vbd::ToolstackBack;
use rustix::fs::{CWD, Mode, OFlags, mkfifoat};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Set in the server process: the directory of all files, and the disk.
const SERVE: &str = "PVIO_TEST_SERVE_FENCED_IN";
const DISK: &str = "PVIO_TEST_DISK_TO_SERVE";
const TEST: &str = "fenced::fence_delays_successor_until_write_of_killed_process_lands";
const FENCE: &str = "vbd-1-51712.fence";
/// The byte that the first server writes, and the one its successor writes.
pub const OLD: u8 = 0x0d;
const NEW: u8 = 0xe3;
const SECTOR: u64 = 64;

/// The guest, which notifies by writing a byte to a FIFO.
#[derive(Clone)]
struct Guest {
    memory: Memory,
    fifo: PathBuf,
}

impl GrantMapper for Guest {
    type Mapping = Part<RecordFile>;

    fn map(&self, d: DomId, grefs: &[GrantRef], a: Access) -> Result<Self::Mapping, GrantStatus> {
        self.memory.map(d, grefs, a)
    }
}

impl GrantCopier for Guest {
    fn copy(&self, ops: &mut [CopyOp<'_>]) {
        self.memory.copy(ops);
    }
}

impl EventChannels for Guest {
    type Channel = Fifo;

    fn alloc_unbound(&self, _: DomId) -> Result<Fifo, EventError> {
        Err(EventError::NoPorts)
    }

    fn bind_interdomain(&self, _: DomId, _: Port) -> Result<Fifo, EventError> {
        Ok(Fifo::open(&self.fifo))
    }
}

struct Fifo(File);

impl Fifo {
    fn open(path: &Path) -> Self {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Self(rustix::fs::open(path, flags, Mode::empty()).unwrap().into())
    }
}

impl AsFd for Fifo {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl EventChannel for Fifo {
    fn port(&self) -> Port {
        Port(0)
    }

    /// Not needed, because the guest polls the ring.
    fn notify(&self) -> Result<(), EventError> {
        Ok(())
    }

    fn take(&self) -> Result<bool, EventError> {
        Ok(rustix::io::read(&self.0, &mut [0u8; 64]).is_ok())
    }
}

/// Serves like a daemon, until it is killed.
fn serve(dir: &Path, disk: &str) -> ! {
    let waiting = tracing_subscriber::fmt().with_ansi(false).finish();
    tracing::subscriber::set_global_default(waiting).unwrap();
    let records = RecordDir::open(dir).unwrap();
    let memory = Memory(records.existing("memory", MEMORY).unwrap());
    let guest = Guest { memory, fifo: dir.join("event") };
    let server = ImageServer::new(guest.clone(), Arc::new(|| ()));
    let mut server = server.recorded_in(records.clone());
    let addr = DeviceAddr::new(BackendKind::Vbd, DomId(0), DomId(1), 51712);
    let mut told = ToolstackBack::new(addr, disk);
    told.kind = "pvio".into();
    let geometry = server.open(&told).unwrap();
    println!("\nserver: open");
    let mut ring = pvio_ring::BackRing::attach(guest.memory.page(0), ABI.slot_size()).unwrap();
    let open = Arc::clone(server.open_disk().unwrap());
    let flushes = Arc::clone(open.flush_state());
    let record = match records.existing("record", key().record_len()) {
        Ok(file) => {
            let record = Record::open(file, key()).unwrap();
            if record.flush_failed() {
                flushes.mark_failed();
            }
            QueueRecord::resume(&record, 0, &mut ring, ABI, true).unwrap()
        }
        Err(_) => {
            let file = records.create("record", key().record_len()).unwrap();
            let record = Record::create(file, key()).unwrap();
            let first = QueueRecord::new(&record, 0, &ring, ABI).unwrap();
            record.commit();
            first
        }
    };
    let parts = QueueParts {
        frontend: DomId(1),
        disk: Arc::new(DiskState::with(geometry, flushes, MappingBudget::unlimited())),
        channel: guest.bind_interdomain(DomId(1), Port(0)).unwrap(),
        grants: guest,
        data_path: DataPath::Copy,
        ring,
        abi: ABI,
        max_indirect_segments: 0,
        record,
        stats: Arc::new(Stats::default()),
    };
    let _queue = ImageQueues::new(open, Arc::new(|| ())).start("vbd", parts).unwrap();
    loop {
        std::thread::park();
    }
}

/// A server process and its output.
pub struct Server {
    process: Child,
    lines: Receiver<String>,
}

impl Server {
    /// Serves a disk in a separate process.
    pub fn start(dir: &Path, disk: &str) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", TEST, "--nocapture"])
            .env(SERVE, dir)
            .env(DISK, disk)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(process.stdout.take().unwrap());
        let (tell, lines) = channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                let _ = tell.send(line);
            }
        });
        Self { process, lines }
    }

    /// Waits until the server reports that it waits for its predecessor's I/O, or that it has the
    /// disk open.
    fn waits_or_opens(&self) -> &'static str {
        loop {
            let line = self.lines.recv_timeout(PATIENCE).expect("server printed no line");
            if line.contains("waiting for the I/O of an earlier process to end") {
                return "waits";
            }
            if line.starts_with("server: open") {
                return "opens";
            }
        }
    }
}

impl Server {
    /// Waits until the server has the disk open.
    pub fn opens(&self) {
        while self.waits_or_opens() != "opens" {}
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The guest's side of the ring.
pub struct Front {
    memory: Memory,
    ring: FrontRing<Part<RecordFile>>,
    event: Fifo,
}

impl Front {
    /// Creates a guest whose files are in that directory.
    pub fn new(dir: &Path, memory: Memory) -> Self {
        mkfifoat(CWD, dir.join("event"), Mode::RUSR | Mode::WUSR).unwrap();
        let ring = FrontRing::init(memory.page(0), ABI.slot_size()).unwrap();
        Self { memory, ring, event: Fifo::open(&dir.join("event")) }
    }

    /// Submits a write of a page with that byte.
    pub fn write(&mut self, byte: u8) {
        self.memory.page(1).fill(0, PAGE_SIZE, byte).unwrap();
        self.ask(1, 1, byte.into());
    }

    pub fn flush(&mut self, id: u64) {
        self.ask(3, 0, id);
    }

    fn ask(&mut self, op: u8, segments: u8, id: u64) {
        let mut slot = vec![op, segments, 0, 0, 0, 0, 0, 0];
        slot.extend(id.to_le_bytes());
        slot.extend((SECTOR * u64::from(segments)).to_le_bytes());
        slot.extend(1u32.to_le_bytes());
        slot.extend([0, 7, 0, 0]);
        slot.resize(ABI.slot_size(), 0);
        self.ring.push(&slot).unwrap();
        let _ = self.ring.publish();
        rustix::io::write(&self.event, &[1]).unwrap();
    }

    pub fn answer(&mut self) -> Option<(u64, Status)> {
        let mut response = self.ring.pop().unwrap()?;
        let response = Response::read(&mut response).unwrap();
        Some((response.id, response.status))
    }

    /// Waits for the next response, which must be this one.
    pub fn done(&mut self, id: u64, status: Status) {
        let begin = Instant::now();
        loop {
            if let Some(answer) = self.answer() {
                assert_eq!(answer, (id, status));
                return;
            }
            assert!(begin.elapsed() < PATIENCE, "request {id:#x} has no response");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Returns an image of 4 MiB whose data clusters are allocated, so that a write changes nothing but
/// data.
fn image(dir: &Path, format: &str) -> Vec<u8> {
    if format == "raw" {
        return vec![0xaa; 4 << 20];
    }
    let path = dir.join("new.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", text(&path), "4M"]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 0xaa 0 4M", text(&path)]);
    std::fs::read(path).unwrap()
}

/// Returns the contents of the page after a server was killed with a write in flight and its
/// successor has written there.
fn page_after_a_kill(disk: &str, fence: bool) -> u8 {
    let parent = tempfile::tempdir().unwrap();
    let (format, options) = disk.split_once(' ').unwrap_or((disk, ""));
    let slow = SlowStorage::new(image(parent.path(), format));
    let mount = parent.path().join("slow");
    std::fs::create_dir(&mount).unwrap();
    let mounted: Mounted = slow.mount(&mount);
    let spec = format!("{options}{format}:{}", text(&mount.join("disk")));
    let dir = parent.path().join("records");
    let records = RecordDir::open(&dir).unwrap();
    let mut front = Front::new(&dir, Memory(records.create("memory", MEMORY).unwrap()));

    let mut first = Server::start(&dir, &spec);
    assert_eq!(first.waits_or_opens(), "opens");
    slow.hold_write(OLD);
    front.write(OLD);
    assert!(slow.wait_for_held_write(PATIENCE), "{spec}: no write reaches the storage");
    first.process.kill().unwrap();
    if disk == DISKS[0] {
        // Only the kernel's in-flight I/O is left of the process. With the other disks, a thread of
        // it is still in the write.
        first.process.wait().unwrap();
    }
    if !fence {
        std::fs::remove_file(dir.join(FENCE)).unwrap();
    }
    let successor = Server::start(&dir, &spec);
    assert_eq!(successor.waits_or_opens(), if fence { "waits" } else { "opens" }, "{spec}");
    if fence {
        assert_eq!(
            front.answer(),
            None,
            "{spec}: response before the write of the killed process has landed"
        );
        slow.release_write();
        assert_eq!(successor.waits_or_opens(), "opens", "{spec}");
    }
    front.done(OLD.into(), Status::Okay);
    front.write(NEW);
    front.done(NEW.into(), Status::Okay);
    slow.release_write();
    drop((successor, first));
    drop(mounted);
    let bytes = slow.bytes();
    // In a qcow2 image the page is somewhere after the tables.
    let old = bytes.chunks(PAGE_SIZE).filter(|page| **page == [OLD; PAGE_SIZE]).count();
    let new = bytes.chunks(PAGE_SIZE).filter(|page| **page == [NEW; PAGE_SIZE]).count();
    match (old, new) {
        (0, 1) => NEW,
        (1, 0) => OLD,
        other => panic!("{spec}: {other:?} old and new pages"),
    }
}

/// Disks whose writes are executed by io_uring, by a thread of io_uring, and by a thread of pvio.
const DISKS: [&str; 4] = ["raw [direct]", "raw", "qcow2", "qcow2 [direct]"];

fn can_run() -> bool {
    can_serve_files() && has("qemu-img", "qemu-utils") && has("qemu-io", "qemu-utils")
}

#[test]
fn fence_delays_successor_until_write_of_killed_process_lands() {
    if let (Some(dir), Ok(disk)) = (std::env::var_os(SERVE), std::env::var(DISK)) {
        serve(Path::new(&dir), &disk);
    }
    if !can_run() {
        return;
    }
    for disk in DISKS {
        assert_eq!(page_after_a_kill(disk, true), NEW, "{disk}");
    }
}

/// Checks that the test above can fail: only the fence keeps the successor of such a process from
/// writing first. If a thread of the process is in the write, this file system's own lock makes the
/// successor wait as well.
#[test]
fn without_fence_write_of_killed_process_lands_after_successor() {
    if can_run() {
        assert_eq!(page_after_a_kill(DISKS[0], false), OLD);
    }
}
