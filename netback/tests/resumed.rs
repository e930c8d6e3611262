//! A backend process that is killed repeatedly while a guest sends and receives. Rings, record and
//! the guest's pages are in files that all processes map, and datagrams are the wire.
#![cfg(feature = "std")]

#[path = "resumed/guest.rs"]
mod guest;
#[path = "resumed/memory.rs"]
mod memory;

use guest::{GROUP, Guest};
use memory::{FRONT, MEMORY, Memory, QUEUES, control_refs, queue_refs};
use pvio_netback::port::{FRAME_MAX, NetPort, Offload, Packet, PortError, WouldBlock};
use pvio_netback::queue::{QueueSet, SessionRefs, VifRecord, Waker};
use pvio_netback::{Features, Queue, Stats};
use pvio_recordfile::{RecordDir, RecordFile};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Environment variable of the process to be killed: the directory of all files, and the number of
/// processes killed before it.
const SERVE: &str = "PVIO_TEST_SERVE_IN";
const LIFE: &str = "PVIO_TEST_LIFE";
const TEST: &str = "guest_loses_no_request_if_backends_are_killed";
/// Budget of one poll in packets, for each direction.
const BUDGET: usize = 64;
/// Longest time without progress.
const PATIENCE: Duration = Duration::from_secs(60);
const KILLS: u64 = 100;

/// Port of one queue. A flush sends each packet as a datagram, after the number of the process and
/// the queue.
struct Wire {
    socket: UnixDatagram,
    far: PathBuf,
    head: [u8; 9],
    pending: Vec<Vec<u8>>,
}

impl Wire {
    fn new(dir: &Path, life: u64, queue: usize) -> Self {
        let near = dir.join(format!("back-{queue}"));
        let _ = std::fs::remove_file(&near);
        let socket = UnixDatagram::bind(near).unwrap();
        let mut head = [queue as u8; 9];
        head[..8].copy_from_slice(&life.to_le_bytes());
        Self { socket, far: dir.join("wire"), head, pending: Vec::new() }
    }
}

impl NetPort for Wire {
    type Buf = Box<[u8]>;
    const HEADROOM: usize = 0;

    fn reserve(&mut self) -> Result<Box<[u8]>, WouldBlock> {
        Ok(vec![0; FRAME_MAX].into())
    }

    fn unreserve(&mut self, _: Box<[u8]>) {}

    fn send(&mut self, packet: Packet<Box<[u8]>>) -> Result<(), PortError> {
        self.pending.push([&self.head, packet.frame()].concat());
        Ok(())
    }

    fn receive(&mut self) -> Option<Packet<Box<[u8]>>> {
        let mut buf: Box<[u8]> = vec![0; FRAME_MAX].into();
        self.socket.set_nonblocking(true).unwrap();
        let len = self.socket.recv(&mut buf).ok()?;
        Some(Packet { buf, start: 0, len, offload: Offload::default() })
    }

    fn recycle(&mut self, _: Box<[u8]>) {}

    fn flush(&mut self) {
        self.socket.set_nonblocking(false).unwrap();
        for frame in self.pending.drain(..) {
            self.socket.send_to(&frame, &self.far).unwrap();
        }
    }
}

/// Serves until the process is killed.
fn serve(dir: &Path, life: u64) -> ! {
    type Back = Queue<Memory, Box<[u8]>, RecordFile>;
    let records = RecordDir::open(dir).unwrap();
    let memory = Memory(records.existing("memory", MEMORY).unwrap());
    let (refs, control) = (queue_refs(), control_refs());
    let session = SessionRefs { peer: FRONT, device: 0, queues: &refs, control: Some(control) };
    let len = session.record_len();
    // The first process creates the record.
    let record = match records.existing("record", len) {
        Ok(file) => VifRecord::open(file, &session).unwrap(),
        Err(_) => VifRecord::create(records.create("record", len).unwrap(), &session).unwrap(),
    };
    let groups = Arc::new(record.groups().unwrap());
    groups.set_filter(true);
    let features = Features { sg: true, rx_notify: true, names_groups: true, ..Features::LEAST };
    let attach = |(index, refs)| -> Back {
        let (parts, stats) = ((&record, index, &groups), Arc::new(Stats::default()));
        Queue::attach_recorded(memory.clone(), FRONT, refs, features, stats, parts).unwrap()
    };
    let mut queues: Vec<_> = refs.iter().enumerate().map(attach).collect();
    let nothing: Waker = Arc::new(|| ());
    let set = QueueSet::new(vec![nothing; QUEUES]);
    queues.iter_mut().enumerate().for_each(|(index, queue)| queue.join(&set, index));
    queues[0].serve_control_recorded(&control, false, &record).unwrap();
    if !record.is_resumed() {
        record.commit();
    }
    let mut ports: Vec<_> = (0..QUEUES).map(|queue| Wire::new(dir, life, queue)).collect();
    loop {
        for (queue, port) in queues.iter_mut().zip(&mut ports) {
            if !queue.poll(port, BUDGET).unwrap().any() {
                std::thread::yield_now();
            }
        }
    }
}

/// Serving process, which is killed when this is dropped.
struct Server(Child);

impl Server {
    fn start(dir: &Path, life: u64) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", TEST, "--nocapture"])
            .env(SERVE, dir)
            .env(LIFE, life.to_string())
            .stdout(Stdio::null())
            .spawn();
        Self(child.unwrap())
    }

    /// Runs the guest until `done`.
    fn until(&mut self, guest: &mut Guest, done: impl Fn(&Guest) -> bool) {
        let begun = Instant::now();
        while !done(guest) {
            guest.work();
            assert!(self.0.try_wait().unwrap().is_none(), "the backend ended on its own");
            assert!(begun.elapsed() < PATIENCE, "the guest does not finish: {guest:?}");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn guest_loses_no_request_if_backends_are_killed() {
    if let Some(dir) = std::env::var_os(SERVE) {
        serve(Path::new(&dir), std::env::var(LIFE).unwrap().parse().unwrap());
    }
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("records");
    let records = RecordDir::open(&dir).unwrap();
    let memory = Memory(records.create("memory", MEMORY).unwrap());
    let mut guest = Guest::new(&dir, memory);
    for life in 0..KILLS {
        let mut server = Server::start(&dir, life);
        if life == 0 {
            server.until(&mut guest, Guest::is_set_up);
        }
        // Killed at a different point each time, with packets in both directions since the last
        // time.
        let (sent, received) = (guest.answered + 50 + life * 37 % 101, guest.received + 20);
        server.until(&mut guest, |guest| guest.answered >= sent && guest.received >= received);
        drop(server);
        guest.bury();
    }
    let mut server = Server::start(&dir, KILLS);
    guest.stop();
    server.until(&mut guest, Guest::is_quiet);
    // All frames are still steered to the last queue, and every buffer of each queue is returned
    // once.
    for queue in (0..QUEUES).rev() {
        guest.steer_to(queue);
        server.until(&mut guest, Guest::is_set_up);
        guest.fill(queue);
        server.until(&mut guest, |guest| guest.has_all_buffers(queue));
    }
    println!(
        "{} packets sent, {} received, {} twice",
        guest.answered, guest.received, guest.repeated
    );
    assert!(guest.heard_group > 0, "frames of joined group {GROUP:?} were received");
}
