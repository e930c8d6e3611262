//! The connection to xenstore is lost at any request.

use super::Bench;
use pvio_xenbus::driver::HotplugMode;
use pvio_xenbus::handshake::common::read_error;
use pvio_xenbus::wire::Op;
use pvio_xenbus::{WatchEvent, XenbusState, Xenstore, XsError};
use std::time::Duration;

/// Xenstore whose connection is lost at a request.
struct Cut<'a> {
    xs: &'a mut dyn Xenstore,
    /// Number of requests up to and including that one; 0 if it was lost before.
    left: &'a mut usize,
    /// Whether the server executes that request.
    executes: bool,
    lost: bool,
}

impl Xenstore for Cut<'_> {
    fn request(&mut self, op: Op, tx_id: u32, parts: &[&[u8]]) -> Result<Vec<u8>, XsError> {
        if self.lost {
            return Err(XsError::Closed);
        }
        self.lost = *self.left == 1;
        *self.left = self.left.saturating_sub(1);
        if !self.lost {
            return self.xs.request(op, tx_id, parts);
        }
        if self.executes {
            let _ = self.xs.request(op, tx_id, parts);
        }
        if tx_id != 0 {
            // The server ends the transactions of a connection.
            let _ = self.xs.request(Op::TransactionEnd, tx_id, &[b"F\0"]);
        }
        Err(XsError::Closed)
    }

    fn poll_event(&mut self) -> Result<Option<WatchEvent>, XsError> {
        self.xs.poll_event()
    }

    fn wait_event(&mut self, timeout: Option<Duration>) -> Result<Option<WatchEvent>, XsError> {
        self.xs.wait_event(timeout)
    }
}

#[test]
fn driver_that_loses_its_connection_at_any_request_continues_on_the_next_one() {
    use XenbusState as S;
    for executes in [false, true] {
        for cut in 1.. {
            let mut b = Bench::new(HotplugMode::Plain);
            let mut left = cut;
            let states = [
                (S::Initialised, S::Connected),
                (S::Connected, S::Connected),
                (S::Closing, S::Closing),
                (S::Closed, S::Closed),
                (S::Initialising, S::InitWait),
                (S::Initialised, S::Connected),
            ];
            for (front, back) in states {
                b.frontend(front);
                let xs = &mut b.world.back;
                let mut xs = Cut { xs, left: &mut left, executes, lost: false };
                let stepped = b.driver.step(&mut xs);
                if xs.lost {
                    assert_eq!(stepped, Err(XsError::Closed), "request {cut}, {executes}");
                    b.step();
                }
                assert_eq!(b.state(), back, "request {cut}, {executes}, frontend {front}");
                // The queues are stopped when the frontend is Closed.
                let is_connected = matches!(back, S::Connected | S::Closing);
                assert_eq!(b.class.connected.get(), is_connected, "request {cut}, {executes}");
            }
            assert_eq!(b.class.prepared.get(), 1, "request {cut}, {executes}");
            let why = read_error(&mut b.world.dom0, &b.back).unwrap();
            assert_eq!(why, None, "request {cut}, {executes}");
            if left > 0 {
                assert!(cut > 20, "only {cut} requests");
                break;
            }
        }
    }
}
