//! The server over a real tap in its own network namespace: curl and hostile clients.
#![allow(missing_docs, reason = "tests")]

use pvio_demo::guest::fs::thread::FsThread;
use pvio_demo::guest::fs::{BlockRead, Disk, FileDisk, MemDisk};
use pvio_demo::guest::http::{CONNECTIONS, Config, HEAD_TIME, SOCKETS, Server, ServerStatus};
use pvio_demo::guest::status::{Device, Devices};
use smoltcp::phy::{self, Medium, TunTapInterface};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const GUEST: &str = "10.107.0.2";

/// Runs the test of that name again, alone, in new namespaces; returns true inside of them.
fn inside(name: &str) -> bool {
    if std::env::var_os("PVIO_TEST_INSIDE").is_some() {
        sh("ip link set lo up && ip tuntap add mode tap name pvio0 && \
            ip addr add 10.107.0.1/24 dev pvio0 && ip link set pvio0 up");
        return true;
    }
    let can = Command::new("unshare").args(["--user", "--map-root-user", "--net", "true"]).output();
    let ip = Command::new("ip").arg("-V").output();
    let curl = Command::new("curl").arg("-V").output();
    if !can.is_ok_and(|o| o.status.success()) || ip.is_err() || curl.is_err() {
        eprintln!(
            "SKIPPED: no new network namespace; install util-linux, iproute2 and curl, and allow user namespaces"
        );
        return false;
    }
    let status = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "--kill-child"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env("PVIO_TEST_INSIDE", "1")
        .status()
        .unwrap();
    assert!(status.success());
    false
}

fn sh(line: &str) -> Vec<u8> {
    let out = Command::new("sh").args(["-c", line]).output().unwrap();
    assert!(out.status.success(), "{line}: {}", String::from_utf8_lossy(&out.stderr));
    out.stdout
}

fn serve(disk: impl BlockRead + 'static) {
    let server_status = ServerStatus {
        name: "guest <1>".into(),
        address: GUEST.into(),
        started: Instant::now(),
        fs: None,
        devices: Devices::default(),
        http: Default::default(),
        disk: Default::default(),
    };
    server_status.devices.set(Device {
        name: "vbd-51712".into(),
        kind: "disk",
        state: "Connected".into(),
        backend_state: "Connected".into(),
        features: vec![("feature-persistent".into(), "1".into())],
        reattached: 0,
    });
    let meter = Some(server_status.disk.clone());
    let (fs, responses) = FsThread::start_metered(Disk::new(disk), Box::new(|| ()), meter).unwrap();
    let config = Config {
        mac: [0x02, 0x16, 0x3e, 0, 0, 1],
        address: GUEST.parse().unwrap(),
        prefix: 24,
        gateway: None,
        port: 80,
    };
    let (ready, opened) = crossbeam_channel::bounded(1);
    std::thread::spawn(move || {
        let mut tap = TunTapInterface::new("pvio0", Medium::Ethernet).unwrap();
        ready.send(()).unwrap();
        Server::new(config, fs, responses, server_status).run(&mut tap, |tap, delay| {
            // The disk thread cannot wake the stack's own tap, so the tap is polled often.
            let delay = delay.unwrap_or(Duration::from_millis(1)).min(Duration::from_millis(1));
            let _ = phy::wait(tap.as_raw_fd(), Some(delay.into()));
            ControlFlow::Continue(())
        });
    });
    opened.recv().unwrap();
}

/// Returns status, headers and body of a request by curl.
fn curl(args: &[&str]) -> (u16, String, Vec<u8>) {
    let out = Command::new("curl")
        .args(["-sS", "--max-time", "60", "--path-as-is", "-D", "/dev/stderr"])
        .args(args)
        .output()
        .unwrap();
    let head = String::from_utf8_lossy(&out.stderr).into_owned();
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    assert!(out.status.success() || status != 0, "curl {args:?}: {head}");
    (status, head, out.stdout)
}

fn get(path: &str) -> (u16, Vec<u8>) {
    let (status, _, body) = curl(&[&format!("http://{GUEST}{path}")]);
    (status, body)
}

/// Sends these bytes, and returns the response up to the end of the connection.
fn raw(bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect((GUEST, 80)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.write_all(bytes).unwrap();
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn status_json() -> serde_json::Value {
    serde_json::from_slice(&get("/.pvio/status.json").1).unwrap()
}

#[test]
fn http_serves_every_file_of_ext4_image_unchanged() {
    if !inside("http_serves_every_file_of_ext4_image_unchanged") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("tree");
    for path in ["", "a/b/c", "many", "site"] {
        fs::create_dir_all(from.join(path)).unwrap();
    }
    let noise: Vec<u8> =
        (0..9_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    fs::write(from.join("large.bin"), &noise).unwrap();
    fs::write(from.join("empty"), b"").unwrap();
    fs::write(from.join("a/b/c/odd name & <x>%.txt"), b"odd").unwrap();
    fs::write(from.join("site/index.html"), b"<p>index").unwrap();
    for i in 0..50 {
        fs::write(from.join(format!("many/{i}.bin")), &noise[i * 1000..i * 3700]).unwrap();
    }
    let image = dir.path().join("disk.img");
    let (from, to) = (from.display().to_string(), image.display().to_string());
    sh(&format!("truncate -s 48M {to} && mke2fs -q -F -t ext4 -d {from} {to}"));
    serve(FileDisk::new(File::open(image).unwrap()).unwrap());

    assert!(get("/large.bin").1 == noise);
    assert_eq!(get("/empty"), (200, Vec::new()));
    assert_eq!(get("/a/b/c/odd%20name%20%26%20%3cx%3E%25.txt").1, b"odd");
    for i in 0..50 {
        assert!(get(&format!("/many/{i}.bin")).1 == noise[i * 1000..i * 3700], "{i}");
    }
    // All in parallel, over persistent connections.
    let all: String = (0..50).map(|i| format!("http://{GUEST}/many/{i}.bin ")).collect();
    let sum = sh(&format!("curl -sS --parallel --parallel-max 20 {all} | wc -c"));
    let expected: usize = (0..50).map(|i| i * 2700).sum();
    assert_eq!(String::from_utf8(sum).unwrap().trim(), expected.to_string());

    let url = format!("http://{GUEST}/large.bin");
    for (range, part) in
        [("5-9", 5..10), ("8999990-", 8_999_990..9_000_000), ("-7", 8_999_993..9_000_000)]
    {
        let (status, head, body) = curl(&["-r", range, &url]);
        assert_eq!(status, 206);
        assert!(head.contains(&format!(
            "Content-Range: bytes {}-{}/9000000",
            part.start,
            part.end - 1
        )));
        assert!(body == noise[part]);
    }
    let (status, head, body) = curl(&["-I", &url]);
    assert!(
        status == 200 && body.len() < 1000 && head.contains("Content-Length: 9000000"),
        "{head}"
    );
    let etag = head.lines().find_map(|l| l.strip_prefix("ETag: ")).unwrap();
    let (status, _, body) = curl(&["-H", &format!("If-None-Match: {etag}"), &url]);
    assert_eq!((status, body.len()), (304, 0));
    let (status, head, _) = curl(&["-I", "-r", "5-9", &url]);
    assert!(status == 200 && head.contains("Content-Length: 9000000"), "{head}");
    let (status, _, _) = curl(&["-H", "If-Match: \"another\"", &url]);
    assert_eq!(status, 412);
    let (status, head, _) = curl(&["-r", "9000000-", &url]);
    assert!(status == 416 && head.contains("bytes */9000000"), "{head}");

    let (status, head, _) = curl(&[&format!("http://{GUEST}/a")]);
    assert!(status == 301 && head.contains("Location: /a/\r\n"), "{head}");
    assert_eq!(get("/site/").1, b"<p>index");
    let list = String::from_utf8(get("/site/?list").1).unwrap();
    assert!(list.contains("href=\"index.html\""), "{list}");
    let list = String::from_utf8(get("/a/b/c/").1).unwrap();
    assert!(
        list.contains("odd%20name%20%26%20%3Cx%3E%25%2Etxt")
            || list.contains("odd%20name%20%26%20%3Cx%3E%25.txt"),
        "{list}"
    );
    let home = String::from_utf8(get("/").1).unwrap();
    assert!(home.contains("guest &lt;1&gt;") && home.contains("href=\"large.bin\""));

    let status = status_json();
    assert_eq!(status["fs"]["kind"], "ext4");
    assert_eq!(status["devices"][0]["name"], "vbd-51712");
    assert!(status["http"]["total_bytes"].as_u64().unwrap() > 9_000_000);
    assert!(status["disk"]["total"].as_u64().unwrap() > 0);
    let metrics = String::from_utf8(get("/.pvio/metrics").1).unwrap();
    assert!(metrics.contains("pvio_device_connected{device=\"vbd-51712\"} 1"), "{metrics}");
}

#[test]
fn hostile_http_clients_get_error_status_and_affect_no_others() {
    if !inside("hostile_http_clients_get_error_status_and_affect_no_others") {
        return;
    }
    serve(MemDisk::new(pvio_demo::image::image_bytes(8 << 20).unwrap()));
    for (path, status) in [
        ("/nothing", 404),
        ("/hello.txt/x", 404),
        ("/hello.txt/", 404),
        ("/../../etc/passwd", 403),
        ("/%2e%2e/%2e%2e/etc/passwd", 403),
        ("/%zz", 400),
        ("/a%00", 400),
        ("/.pvio/other", 404),
        ("/HELLO.TXT", 200),
    ] {
        assert_eq!(get(path).0, status, "{path}");
    }
    assert_eq!(curl(&["-X", "DELETE", &format!("http://{GUEST}/hello.txt")]).0, 405);
    assert_eq!(curl(&["-d", "x=y", &format!("http://{GUEST}/")]).0, 413);

    let text = |bytes: &[u8]| raw(bytes).lines().next().unwrap_or_default().to_owned();
    assert_eq!(text(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"), "HTTP/1.1 400 Bad Request");
    assert_eq!(text(&[b'x'; 100_000]), "HTTP/1.1 431 Request Header Fields Too Large");
    assert_eq!(
        text(format!("GET /{} HTTP/1.0\r\n\r\n", "x".repeat(9000)).as_bytes()),
        "HTTP/1.1 414 URI Too Long"
    );
    assert_eq!(text(b"GET / HTTP/9.9\r\n\r\n"), "HTTP/1.1 505 HTTP Version Not Supported");
    assert_eq!(text(b"GET / HT"), "");
    assert_eq!(text(b""), "");
    // Many requests in one segment get their responses in order.
    let responses = raw(&b"GET /hello.txt HTTP/1.1\r\nHost: x\r\n\r\n".repeat(40));
    assert_eq!(responses.matches("HTTP/1.1 200 OK").count(), 40);
    assert_eq!(responses.matches("Hello from a virtual disk.").count(), 40);

    // Clients that do not read their responses, or that send nothing, must not exhaust the sockets.
    let mut hold = Vec::new();
    for _ in 0..CONNECTIONS / 2 {
        let mut stream = TcpStream::connect((GUEST, 80)).unwrap();
        stream.write_all(b"GET /data/noise.bin HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        hold.push(stream);
    }
    for _ in 0..CONNECTIONS / 4 {
        hold.push(TcpStream::connect((GUEST, 80)).unwrap());
    }
    let demo = pvio_demo::image::files();
    let noise = &demo.iter().find(|f| f.path == "data/noise.bin").unwrap().bytes;
    assert!(get("/data/noise.bin").1 == *noise);
    // Clients that disconnect during a response do no harm, whatever their number.
    drop(hold);
    for _ in 0..200 {
        let mut stream = TcpStream::connect((GUEST, 80)).unwrap();
        stream.write_all(b"GET /data/noise.bin HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut some = [0; 100];
        stream.read_exact(&mut some).unwrap();
    }
    // Nor do connections with a single request.
    for _ in 0..300 {
        let answer = raw(b"GET /hello.txt HTTP/1.0\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("as Xen lays them out.\n"));
    }
    assert!(get("/data/noise.bin").1 == *noise);
}

#[test]
fn half_sent_requests_are_evicted_and_surplus_client_waits() {
    if !inside("half_sent_requests_are_evicted_and_surplus_client_waits") {
        return;
    }
    serve(MemDisk::new(pvio_demo::image::image_bytes(8 << 20).unwrap()));
    let half_sent = |n| {
        let clients = (0..n).map(|_| {
            let mut client = TcpStream::connect((GUEST, 80)).unwrap();
            client.write_all(b"GET /hello.txt HTTP/1.1\r\nHo").unwrap();
            client
        });
        clients.collect::<Vec<_>>()
    };
    for n in [CONNECTIONS, SOCKETS] {
        let begin = Instant::now();
        let held = half_sent(n);
        assert_eq!(get("/hello.txt").0, 200);
        // Otherwise they would have had the full timeout of a head.
        assert!(begin.elapsed() < HEAD_TIME, "{n} clients: {:?}", begin.elapsed());
        drop(held);
    }
    // Clients that do not read their responses keep their sockets.
    let mut held: Vec<_> = (0..SOCKETS)
        .map(|_| {
            let mut client = TcpStream::connect((GUEST, 80)).unwrap();
            client.write_all(b"GET /data/noise.bin HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
            let mut some = [0; 100];
            client.read_exact(&mut some).unwrap();
            client
        })
        .collect();
    let waits = std::thread::spawn(|| raw(b"GET /hello.txt HTTP/1.0\r\n\r\n"));
    std::thread::sleep(Duration::from_millis(300));
    assert!(!waits.is_finished(), "it was refused, or served beyond the sockets there are");
    held.truncate(SOCKETS / 2);
    assert!(waits.join().unwrap().starts_with("HTTP/1.1 200"));
}

/// A disk whose reads fail once the flag is set.
struct Dying(MemDisk, Arc<AtomicBool>);

impl BlockRead for Dying {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.1.load(Ordering::Relaxed) {
            return Err(io::Error::other("the driver domain is gone"));
        }
        self.0.read_at(offset, buf)
    }
}

#[test]
fn failed_disk_truncates_response_and_returns_status_500() {
    if !inside("failed_disk_truncates_response_and_returns_status_500") {
        return;
    }
    let dead = Arc::new(AtomicBool::new(false));
    let image = pvio_demo::image::image_bytes(pvio_demo::image::SIZE as usize).unwrap();
    serve(Dying(MemDisk::new(image), Arc::clone(&dead)));
    let url = format!("http://{GUEST}/data/noise.bin");
    let mut stream = TcpStream::connect((GUEST, 80)).unwrap();
    stream.write_all(b"GET /data/noise.bin HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut some = [0; 1000];
    stream.read_exact(&mut some).unwrap();
    dead.store(true, Ordering::Relaxed);
    let mut rest = Vec::new();
    let end = stream.read_to_end(&mut rest);
    assert!(end.is_err() && rest.len() < pvio_demo::image::NOISE_SIZE, "{end:?}, {}", rest.len());
    let (status, _, body) = curl(&["-r", "4000000-", &url]);
    let body = String::from_utf8_lossy(&body).into_owned();
    // Data that was read before may still be cached; anything else must be an error with a reason.
    assert!(
        status == 206 || (status == 500 && body.contains("driver domain is gone")),
        "{status} {body}"
    );
    dead.store(false, Ordering::Relaxed);
    assert_eq!(get("/data/noise.bin").1.len(), pvio_demo::image::NOISE_SIZE);
    assert!(status_json()["http"]["errors"].as_u64().unwrap() > 0);
}
