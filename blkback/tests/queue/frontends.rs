//! Unusual but valid behaviour of frontends.

use crate::late::late;
use crate::rig::{Hostile, Mem, PATHS, SECTORS, raw, run};
use pvio_event_channel::EventChannel;
use pvio_ring::proto::blkif::{Abi, Status};
use pvio_ring::shm::Region;

/// GRUB's requests all have id 0; ids have no meaning to a backend.
#[test]
fn requests_in_flight_with_same_id_complete() {
    for path in PATHS {
        let (mut h, may) = late(path);
        let pages: Vec<_> = (0..5).map(|_| h.page()).collect();
        for (n, (gref, page)) in (0_u8..).zip(&pages) {
            page.fill(0, 4096, n + 1).unwrap();
            h.put(&raw(1, 1, 8 * u64::from(n), &[(gref.0, 0, 7)]));
        }
        run(&mut h.back);
        assert_eq!((h.back.in_flight(), h.answer()), (5, None), "{path}");
        may.set(5);
        run(&mut h.back);
        for _ in 0..5 {
            let answer = h.answer().unwrap();
            assert_eq!((answer.id, answer.status), (7, Status::Okay), "{path}");
        }
        assert_eq!(h.answer(), None);
        for n in 0..5_usize {
            let there = &h.back.engine_mut().disk()[n * 4096..(n + 1) * 4096];
            assert!(there.iter().all(|b| *b == n as u8 + 1), "{path}");
        }
    }
}

/// Firmware and crash dumps poll: they never arm their event index (`rsp_event`), and notify the
/// backend for each request or for none, whatever its event index (`req_event`) is.
#[test]
fn polling_frontend_that_ignores_event_indices_is_served() {
    for path in PATHS {
        let mut h = Hostile::new(path, Abi::X86_64, Mem::zeroed(SECTORS));
        let request = raw(0, 1, 0, &[(h.data.0, 0, 7)]);
        // Several times across the wrap of the ring's slots.
        for n in 0..200 {
            assert!(!h.back.final_check().unwrap(), "final check on an empty ring");
            h.put(&request);
            if n % 2 == 0 {
                // No notification was sent, but the backend is awake for another reason.
                assert!(h.back.final_check().unwrap(), "{path}");
            } else {
                let _ = h.back.channel().take();
            }
            run(&mut h.back);
            assert_eq!(h.answer().unwrap().status, Status::Okay, "{path}");
        }
        assert_eq!(
            h.back.stats().notifies.get(),
            1,
            "{path}: `rsp_event` stays at its first value"
        );
    }
}
