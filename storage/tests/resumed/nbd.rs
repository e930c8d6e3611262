//! A disk at an NBD server, whose backend process is killed: the successor flushes on a new
//! connection before it submits requests again.

use super::fenced::{Front, OLD, Server};
use super::{MEMORY, Memory, PATIENCE};
use pvio_recordfile::RecordDir;
use pvio_ring::proto::blkif::Status;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use tempfile::TempDir;

const SIZE: usize = 4 << 20;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;

/// The behaviour of the server, and the commands it received by connection.
#[derive(Default)]
struct Export {
    has_flush: bool,
    fail_flushes: bool,
    /// A command that gets no reply while this is set.
    held: Option<u16>,
    connections: usize,
    asked: Vec<(usize, u16)>,
    bytes: Vec<u8>,
}

#[derive(Clone, Default)]
struct NbdServer(Arc<(Mutex<Export>, Condvar)>);

impl NbdServer {
    fn start(socket: &Path, has_flush: bool) -> Self {
        let server = Self::default();
        server.set(|export| (export.has_flush, export.bytes) = (has_flush, vec![0; SIZE]));
        let (listener, serving) = (UnixListener::bind(socket).unwrap(), server.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, serving) = (stream.unwrap(), serving.clone());
                let mut number = 0;
                serving.set(|export| {
                    number = export.connections;
                    export.connections += 1;
                });
                // The thread ends when its client disconnects.
                std::thread::spawn(move || serving.serve(stream, number));
            }
        });
        server
    }

    fn set(&self, change: impl FnOnce(&mut Export)) {
        change(&mut self.0.0.lock().unwrap());
        self.0.1.notify_all();
    }

    /// Waits until a connection has sent a command.
    fn asked(&self, what: (usize, u16)) {
        let missing = |export: &mut Export| !export.asked.contains(&what);
        let export = self.0.0.lock().unwrap();
        let (export, _) = self.0.1.wait_timeout_while(export, PATIENCE, missing).unwrap();
        assert!(export.asked.contains(&what), "{what:?} is not among {:?}", export.asked);
    }

    /// Returns the commands of a connection.
    fn by(&self, connection: usize) -> Vec<u16> {
        let asked = &self.0.0.lock().unwrap().asked;
        asked.iter().filter(|(by, _)| *by == connection).map(|(_, command)| *command).collect()
    }

    fn serve(&self, mut stream: UnixStream, number: usize) -> io::Result<()> {
        self.shake_hands(&mut stream)?;
        loop {
            let mut request = [0; 28];
            stream.read_exact(&mut request)?;
            let command = u16::from_be_bytes([request[6], request[7]]);
            let at = u64::from_be_bytes(request[16..24].try_into().unwrap()) as usize;
            let len = u32::from_be_bytes(request[24..28].try_into().unwrap()) as usize;
            let mut data = vec![0; if command == WRITE { len } else { 0 }];
            stream.read_exact(&mut data)?;
            self.set(|export| export.asked.push((number, command)));
            let held = |export: &mut Export| export.held == Some(command);
            let mut export = self.0.1.wait_while(self.0.0.lock().unwrap(), held).unwrap();
            match command {
                READ => data = export.bytes[at..at + len].to_vec(),
                WRITE => export.bytes[at..at + len].copy_from_slice(&std::mem::take(&mut data)),
                DISCONNECT => return Ok(()),
                _ => {}
            }
            const EIO: u32 = 5;
            let error = if command == FLUSH && export.fail_flushes { EIO } else { 0 };
            drop(export);
            let head = [&0x6744_6698u32.to_be_bytes()[..], &error.to_be_bytes(), &request[8..16]];
            stream.write_all(&[&head.concat()[..], &data].concat())?;
        }
    }

    fn shake_hands(&self, stream: &mut UnixStream) -> io::Result<()> {
        const GO: u32 = 7;
        stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
        stream.read_exact(&mut [0; 4])?;
        loop {
            let mut head = [0; 16];
            stream.read_exact(&mut head)?;
            let option = u32::from_be_bytes(head[8..12].try_into().unwrap());
            let len = u32::from_be_bytes(head[12..16].try_into().unwrap());
            stream.read_exact(&mut vec![0; len as usize])?;
            let reply = |kind: u32, data: &[u8]| {
                let magic = 0x0003_e889_0455_65a9u64.to_be_bytes();
                let len = (data.len() as u32).to_be_bytes();
                [&magic[..], &option.to_be_bytes(), &kind.to_be_bytes(), &len, data].concat()
            };
            if option != GO {
                stream.write_all(&reply((1 << 31) + 1, b""))?;
                continue;
            }
            let flags = 1 | u16::from(self.0.0.lock().unwrap().has_flush) << 2;
            let info = [&[0, 0][..], &(SIZE as u64).to_be_bytes(), &flags.to_be_bytes()].concat();
            stream.write_all(&reply(3, &info))?;
            return stream.write_all(&reply(1, b""));
        }
    }
}

/// A disk at a server, and its guest.
struct Rig {
    server: NbdServer,
    front: Front,
    dir: TempDir,
    disk: String,
}

impl Rig {
    /// Creates a disk whose process was killed while it had a write in flight.
    fn killed(has_flush: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let server = NbdServer::start(&socket, has_flush);
        let disk = format!("nbd+unix:///?socket={}", socket.display());
        let records = RecordDir::open(&dir.path().join("records")).unwrap();
        let memory = Memory(records.create("memory", MEMORY).unwrap());
        let front = Front::new(&dir.path().join("records"), memory);
        let mut rig = Self { server, front, dir, disk };
        rig.server.set(|export| export.held = Some(WRITE));
        let first = rig.start();
        rig.front.write(OLD);
        rig.server.asked((0, WRITE));
        drop(first);
        rig
    }

    fn start(&self) -> Server {
        let server = Server::start(&self.dir.path().join("records"), &self.disk);
        server.opens();
        server
    }
}

#[test]
fn resumed_nbd_session_flushes_on_new_connection_before_submitting() {
    let mut rig = Rig::killed(true);
    rig.server.set(|export| export.held = Some(FLUSH));
    let _successor = rig.start();
    rig.server.asked((1, FLUSH));
    assert_eq!(rig.front.answer(), None, "response before the flush");
    assert_eq!(rig.server.by(1), [FLUSH]);
    rig.server.set(|export| export.held = None);
    rig.front.done(OLD.into(), Status::Okay);
    assert_eq!(rig.server.by(1), [FLUSH, WRITE]);
    rig.front.flush(7);
    rig.front.done(7, Status::Okay);
}

#[test]
fn resumed_nbd_session_without_flush_support_submits_immediately() {
    let mut rig = Rig::killed(false);
    rig.server.set(|export| export.held = None);
    let _successor = rig.start();
    rig.front.done(OLD.into(), Status::Okay);
    assert_eq!(rig.server.by(1), [WRITE]);
}

#[test]
fn failed_flush_on_resume_fails_flushes_of_later_processes() {
    let mut rig = Rig::killed(true);
    rig.server.set(|export| (export.held, export.fail_flushes) = (None, true));
    let successor = rig.start();
    rig.front.done(OLD.into(), Status::Okay);
    drop(successor);
    // Flushes also fail in the process after that, whose own flush succeeds.
    rig.server.set(|export| export.fail_flushes = false);
    let _third = rig.start();
    rig.front.flush(7);
    rig.front.done(7, Status::Error);
}
