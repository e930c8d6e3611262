//! Connections to NBD servers that another process makes.

use crate::confined::Confined;
use crate::messages::{receive, send_descriptor};
use crate::resolved;
use crate::support::{has, text};
use pvio_storage::engine::nbd::{Dial, Network};
use pvio_storage::image::spec::{NbdServer, Spec};
use pvio_storage::image::{Disk, HandedFiles, HandedRecord, Image, resolve};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// A server of one disk for one client at a time.
struct Server(Child);

impl Server {
    fn start(socket: &Path, image: &Path) -> Self {
        let _ = std::fs::remove_file(socket);
        let child = Command::new("qemu-nbd")
            .args(["-k", text(socket), "-x", "disk", "-f", "raw", "-t", text(image)])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        while UnixStream::connect(socket).is_err() {
            std::thread::sleep(Duration::from_millis(5));
        }
        Self(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn nbd_client_without_network_uses_connection_and_asks_for_next() {
    if !has("qemu-nbd", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (dir.path().join("a.img"), dir.path().join("s"));
    let data: Vec<u8> = (0..2 << 20).map(|i| (i >> 9) as u8).collect();
    std::fs::write(&image, &data).unwrap();
    let server = Server::start(&socket, &image);
    let disk: Disk = format!("[rw]nbd+unix:///disk?socket={}", text(&socket)).parse().unwrap();
    let (named, resolved) = resolved(&disk);
    assert!(named.records().is_empty());
    assert!(matches!(resolved.files.records()[..], [HandedRecord::Server(_)]));
    assert!(resolved.files.lasting().records().is_empty());
    let confined = Confined::start(&disk, &named, &resolved);
    drop(resolved);
    assert_eq!(confined.opened(), Ok(()));
    // The connection is lost before the first request.
    drop(server);
    let _server = Server::start(&socket, &image);
    confined.proceed();
    assert_eq!(receive::<String>(&confined.socket), "dial");
    let Spec::Nbd(spec) = &disk.spec else { unreachable!() };
    assert!(matches!(spec.server, NbdServer::Unix(_)));
    send_descriptor(&confined.socket, Network.dial(&spec.server).unwrap().as_fd());
    let outcome = confined.finish();
    assert!(outcome.before == data);
    assert!(outcome.after != data && std::fs::read(&image).unwrap() == outcome.after);
}

#[test]
fn nbd_disk_is_served_over_handed_connection() {
    if !has("qemu-nbd", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (dir.path().join("a.img"), dir.path().join("s"));
    std::fs::write(&image, vec![9; 2 << 20]).unwrap();
    let _server = Server::start(&socket, &image);
    let disk: Disk = format!("[ro]nbd+unix:///disk?socket={}", text(&socket)).parse().unwrap();
    // The server accepts one client: the connection is the same.
    assert!(crate::formats::served(&disk).before == vec![9; 2 << 20]);
}

#[test]
fn connection_of_supervisor_is_used_for_handshake_and_not_by_successor() {
    if !has("qemu-nbd", "qemu-utils") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (dir.path().join("a.img"), dir.path().join("s"));
    let data = vec![7; 2 << 20];
    std::fs::write(&image, &data).unwrap();
    let server = Server::start(&socket, &image);
    let disk: Disk = format!("[ro]nbd+unix:///disk?socket={}", text(&socket)).parse().unwrap();
    let named = HandedFiles::open_named(&disk).unwrap().connected(&disk, &Network).unwrap();
    assert_eq!(named.records(), [HandedRecord::Connection]);
    // The helper cannot connect: no server listens at this path now.
    std::fs::remove_file(&socket).unwrap();
    let resolved = resolve(&disk, &named).unwrap();
    let export = resolved.files.export();
    assert_eq!(export.unwrap().size, 2 << 20);
    let lasting = named.with(resolved.files).lasting();
    assert!(lasting.records().is_empty());
    assert_eq!(lasting.export(), export);
    drop(server);

    let _server = Server::start(&socket, &image);
    let successor = HandedFiles::default().exporting(export).redialing(Arc::new(Network));
    let opened = Image::open_handed(&disk, successor, &resolved.geometry).unwrap();
    assert_eq!(crate::confined::read_all(&mut opened.engine(4).unwrap()), data);
}
