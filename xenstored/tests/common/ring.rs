//! A domain's connection to Debian's `xenstored` through its shared page (`struct
//! xenstore_domain_interface` in `io/xs_wire.h`), which is a file here.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use pvio_xenbus::wire::{Frame, Header, Op, XsErrno, decode, split_string, strings};
use pvio_xenbus::{WatchEvent, Xenstore, XsError};

const SIZE: u32 = 1024;
const REQ: u64 = 0;
const RSP: u64 = 1024;
const REQ_CONS: u64 = 2048;
const REQ_PROD: u64 = 2052;
const RSP_CONS: u64 = 2056;
const RSP_PROD: u64 = 2060;
const PATIENCE: Duration = Duration::from_secs(20);

pub struct RingClient {
    page: File,
    events: File,
    domid: u16,
    input: Vec<u8>,
    queue: VecDeque<WatchEvent>,
}

impl RingClient {
    /// Opens the page of an introduced domain.
    pub fn open(dir: &Path, domid: u16) -> Self {
        let open =
            |name: &str| OpenOptions::new().read(true).write(true).open(dir.join(name)).unwrap();
        let page = open(&format!("page-{domid}"));
        Self { page, events: open("events"), domid, input: Vec::new(), queue: VecDeque::new() }
    }

    fn index(&self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.page.read_exact_at(&mut bytes, at).unwrap();
        u32::from_ne_bytes(bytes)
    }

    fn set(&mut self, at: u64, index: u32) {
        self.page.write_all_at(&index.to_ne_bytes(), at).unwrap();
        self.events.write_all(&u32::from(self.domid).to_ne_bytes()).unwrap();
    }

    fn send(&mut self, bytes: &[u8]) {
        let until = Instant::now() + PATIENCE;
        let mut prod = self.index(REQ_PROD);
        for byte in bytes {
            while prod.wrapping_sub(self.index(REQ_CONS)) == SIZE {
                self.set(REQ_PROD, prod);
                self.receive();
                assert!(Instant::now() < until, "server reads nothing from the ring");
            }
            self.page.write_all_at(&[*byte], REQ + u64::from(prod % SIZE)).unwrap();
            prod = prod.wrapping_add(1);
        }
        self.set(REQ_PROD, prod);
    }

    fn receive(&mut self) {
        let mut cons = self.index(RSP_CONS);
        let prod = self.index(RSP_PROD);
        if cons == prod {
            std::thread::sleep(Duration::from_micros(50));
            return;
        }
        while cons != prod {
            let mut byte = [0];
            self.page.read_exact_at(&mut byte, RSP + u64::from(cons % SIZE)).unwrap();
            self.input.push(byte[0]);
            cons = cons.wrapping_add(1);
        }
        self.set(RSP_CONS, cons);
    }

    fn take(&mut self) -> Option<(Header, Vec<u8>)> {
        while let Some(Frame { header, payload }) = decode(&self.input).unwrap() {
            let payload = payload.to_vec();
            self.input.drain(..16 + payload.len());
            if header.op() != Some(Op::WatchEvent) {
                return Some((header, payload));
            }
            let mut parts = strings(&payload).map(|s| String::from_utf8(s.to_vec()).unwrap());
            self.queue.push_back(WatchEvent {
                path: parts.next().unwrap(),
                token: parts.next().unwrap(),
            });
        }
        None
    }
}

impl Xenstore for RingClient {
    fn request(&mut self, op: Op, tx_id: u32, parts: &[&[u8]]) -> Result<Vec<u8>, XsError> {
        let body = parts.concat();
        let header = Header::new(op, 1, tx_id, body.len()).unwrap();
        self.send(&[&header.emit()[..], &body].concat());
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some((header, answer)) = self.take() {
                if header.op() != Some(Op::Error) {
                    return Ok(answer);
                }
                let errno = XsErrno::from_name(split_string(&answer).unwrap().0).unwrap();
                return Err(XsError::Refused { op, path: "".into(), errno });
            }
            assert!(Instant::now() < until, "no response to {op:?}");
            self.receive();
        }
    }

    fn poll_event(&mut self) -> Result<Option<WatchEvent>, XsError> {
        assert!(self.take().is_none(), "response without a request");
        Ok(self.queue.pop_front())
    }

    fn wait_event(&mut self, timeout: Option<Duration>) -> Result<Option<WatchEvent>, XsError> {
        let until = Instant::now() + timeout.unwrap_or(PATIENCE);
        loop {
            match self.poll_event()? {
                None if Instant::now() < until => self.receive(),
                other => return Ok(other),
            }
        }
    }
}
