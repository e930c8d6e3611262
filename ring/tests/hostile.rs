//! A peer that writes arbitrary values anywhere at any time: the other side never panics, never
//! returns more than the ring holds, and reports invalid indices.
#![forbid(unsafe_code)]

use core::sync::atomic::Ordering;
use proptest::prelude::*;
use pvio_ring::shm::{HeapMemory, Region};
use pvio_ring::{BackRing, FrontRing, RingFault};

const REQ_PROD: usize = 0;
const RSP_PROD: usize = 8;

/// An action of the hostile peer on the page, or of the side under test.
#[derive(Clone, Debug)]
enum Step {
    /// Any of the four index words (or the bytes after them) gets an arbitrary value.
    Garbage(usize, u32),
    /// The producer index that the side under test reads becomes its consumer index plus this.
    Near(i32),
    /// A slot is overwritten.
    Slot(u32, u8),
    /// The side under test takes up to this number of items.
    Take(u16),
    /// The side under test produces up to this number of items and publishes them.
    Give(u16),
    /// The side under test makes the final check.
    FinalCheck,
    /// The side under test checks for items without taking any.
    Look,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    proptest::collection::vec(
        prop_oneof![
            2 => (0_usize..16, any::<u32>()).prop_map(|(at, v)| Step::Garbage(at * 4, v)),
            5 => (-40_i32..600).prop_map(Step::Near),
            1 => (any::<u32>(), any::<u8>()).prop_map(|(at, b)| Step::Slot(at, b)),
            5 => (1_u16..600).prop_map(Step::Take),
            4 => (1_u16..600).prop_map(Step::Give),
            2 => Just(Step::FinalCheck),
            1 => Just(Step::Look),
        ],
        1..150,
    )
}

fn geometry() -> impl Strategy<Value = (usize, usize, u32)> {
    (
        prop::sample::select(vec![8_usize, 12, 16, 108, 112]),
        prop_oneof![Just(1_usize), 1_usize..=32],
        prop_oneof![Just(0), (0_u32..600).prop_map(|b| 0_u32.wrapping_sub(b)), any::<u32>()],
    )
}

/// Returns whether `prod` is a value that a correct peer could have written, by trying them all.
fn honest(prod: u32, consumed: u32, most: u32) -> bool {
    (0..=most).any(|ahead| consumed.wrapping_add(ahead) == prod)
}

fn scribble(mem: &HeapMemory, step: &Step, victim_reads: usize, consumed: u32, slots: u32) {
    match *step {
        Step::Garbage(at, value) => assert!(mem.store_u32(at, value, Ordering::Relaxed)),
        Step::Near(d) => {
            let value = consumed.wrapping_add_signed(d);
            assert!(mem.store_u32(victim_reads, value, Ordering::Relaxed));
        }
        Step::Slot(at, byte) => mem.fill(64 + (at % slots) as usize * 8, 8, byte).unwrap(),
        _ => unreachable!("index not written by the peer"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    /// A hostile frontend.
    #[test]
    fn backend_ring_is_safe_against_random_frontend((slot, pages, start) in geometry(), steps in steps()) {
        let mem = HeapMemory::pages(pages);
        let _ = FrontRing::init_at(mem.clone(), slot, start).unwrap();
        let mut back = BackRing::attach(mem.clone(), slot).unwrap();
        let slots = back.layout().slots();
        let (mut taken, mut answered) = (start, start);

        for step in steps {
            // The result that the backend must get if it reads the index now.
            let prod = mem.load_u32(REQ_PROD, Ordering::Relaxed).unwrap();
            let cached = back.waiting() != 0;
            let open = taken.wrapping_sub(answered);
            let lie = !honest(prod, taken, slots - open);
            match step {
                Step::Take(count) => {
                    for _ in 0..count {
                        let cached = back.waiting() != 0;
                        let open = taken.wrapping_sub(answered);
                        prop_assert!(open <= slots, "{open} requests out of {slots} slots");
                        let lie = !honest(prod, taken, slots - open);
                        match back.pop() {
                            Ok(Some(mut request)) => {
                                prop_assert!(open < slots && (cached || !lie));
                                let mut raw = [0; 8];
                                request.read(&mut raw).unwrap();
                                taken = taken.wrapping_add(1);
                            }
                            Ok(None) => {
                                prop_assert!(!cached && !lie && prod == taken);
                                break;
                            }
                            Err(fault) => {
                                prop_assert!(!cached && lie, "fault for valid {prod} at {taken}");
                                let overflow = matches!(fault, RingFault::ProducerOverflow { .. });
                                prop_assert!(overflow);
                                prop_assert_eq!(fault.reason(), "ring-producer-overflow");
                                break;
                            }
                        }
                    }
                }
                Step::Give(count) => {
                    for _ in 0..count {
                        let open = taken.wrapping_sub(answered);
                        prop_assert_eq!(back.push(&[1; 8]).is_ok(), open != 0);
                        if open == 0 {
                            break;
                        }
                        answered = answered.wrapping_add(1);
                    }
                    let _ = back.publish();
                }
                Step::FinalCheck => match back.final_check() {
                    Ok(more) => prop_assert!(cached || !lie && more == (prod != taken)),
                    Err(_) => prop_assert!(!cached && lie),
                },
                Step::Look => match back.look() {
                    Ok(waiting) => {
                        prop_assert!(!lie && waiting == prod.wrapping_sub(taken));
                        prop_assert!(waiting <= slots);
                    }
                    Err(_) => prop_assert!(lie),
                },
                peer => scribble(&mem, &peer, REQ_PROD, taken, slots),
            }
            prop_assert!(back.waiting() <= slots - back.unanswered());
        }
    }

    /// A hostile backend.
    #[test]
    fn frontend_ring_is_safe_against_random_backend((slot, pages, start) in geometry(), steps in steps()) {
        let mem = HeapMemory::pages(pages);
        let mut front = FrontRing::init_at(mem.clone(), slot, start).unwrap();
        let slots = front.layout().slots();
        let (mut asked, mut taken, mut seen) = (start, start, start);

        for step in steps {
            let prod = mem.load_u32(RSP_PROD, Ordering::Relaxed).unwrap();
            match step {
                Step::Take(count) => {
                    for _ in 0..count {
                        let cached = seen != taken;
                        let lie = !honest(prod, taken, asked.wrapping_sub(taken));
                        match front.pop() {
                            Ok(Some(mut response)) => {
                                prop_assert!(taken != asked, "response without a request");
                                prop_assert!(cached || !lie);
                                if !cached {
                                    seen = prod;
                                }
                                let mut raw = [0; 8];
                                response.read(&mut raw).unwrap();
                                taken = taken.wrapping_add(1);
                            }
                            Ok(None) => {
                                prop_assert!(!cached && prod == taken);
                                break;
                            }
                            Err(fault) => {
                                prop_assert!(!cached && lie, "fault for valid {prod} at {taken}");
                                let overflow = matches!(fault, RingFault::ProducerOverflow { .. });
                                prop_assert!(overflow);
                                break;
                            }
                        }
                    }
                }
                Step::Give(count) => {
                    for _ in 0..count {
                        let room = asked.wrapping_sub(taken) < slots;
                        prop_assert_eq!(front.push(&[1; 8]).is_ok(), room);
                        if !room {
                            break;
                        }
                        asked = asked.wrapping_add(1);
                    }
                    let _ = front.publish();
                }
                Step::FinalCheck | Step::Look => {
                    let cached = seen != taken;
                    let lie = !honest(prod, taken, asked.wrapping_sub(taken));
                    let look = matches!(step, Step::Look);
                    match if look { front.has_responses() } else { front.final_check() } {
                        Ok(more) => {
                            prop_assert!(cached || !lie && more == (prod != taken));
                            if !cached {
                                seen = prod;
                            }
                        }
                        Err(_) => prop_assert!(!cached && lie),
                    }
                }
                peer => scribble(&mem, &peer, RSP_PROD, taken, slots),
            }
            prop_assert!(front.in_flight() <= slots);
            prop_assert_eq!(front.in_flight(), asked.wrapping_sub(taken));
        }
    }

    /// A backend that attaches to a ring with arbitrary contents.
    #[test]
    fn attach_accepts_only_possible_indices((slot, pages, _) in geometry(), words: [u32; 4], near in 0_u32..1100) {
        let mem = HeapMemory::pages(pages);
        for near in [None, Some(near)] {
            for (i, word) in words.into_iter().enumerate() {
                assert!(mem.store_u32(i * 4, word, Ordering::Relaxed));
            }
            let rsp = mem.load_u32(RSP_PROD, Ordering::Relaxed).unwrap();
            if let Some(near) = near {
                assert!(mem.store_u32(REQ_PROD, rsp.wrapping_add(near), Ordering::Relaxed));
            }
            let req = mem.load_u32(REQ_PROD, Ordering::Relaxed).unwrap();
            match BackRing::attach(mem.clone(), slot) {
                Ok(back) => {
                    prop_assert!(honest(req, rsp, back.layout().slots()));
                    prop_assert_eq!(back.waiting(), req.wrapping_sub(rsp));
                }
                Err(RingFault::ProducerOverflow { most, .. }) => prop_assert!(!honest(req, rsp, most)),
                Err(other) => prop_assert!(false, "{other}"),
            }
        }
    }
}
