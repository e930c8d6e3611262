//! Byte streams against a model, from any index and across the wrap at 2³², and against peers that
//! write arbitrary index values.
#![forbid(unsafe_code)]

use core::sync::atomic::Ordering;
use proptest::prelude::*;
use pvio_ring::RingFault;
use pvio_ring::byte_ring::{
    ByteRing, CONSOLE_IN, CONSOLE_OUT, StreamLayout, XENSTORE_REQ, XENSTORE_RSP,
};
use pvio_ring::shm::{HeapMemory, Part, Region};
use std::collections::VecDeque;

type Attach = fn(HeapMemory) -> Result<ByteRing<HeapMemory>, RingFault>;

/// The two interfaces: input and output of the first side, and both sides.
fn interfaces() -> [(StreamLayout, StreamLayout, Attach, Attach); 2] {
    [
        (CONSOLE_IN, CONSOLE_OUT, ByteRing::console_frontend, ByteRing::console_backend),
        (XENSTORE_RSP, XENSTORE_REQ, ByteRing::xenstore_client, ByteRing::xenstore_server),
    ]
}

fn start() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), (0_u32..5000).prop_map(|b| 0_u32.wrapping_sub(b)), any::<u32>()]
}

fn set(mem: &HeapMemory, at: usize, value: u32) {
    assert!(mem.store_u32(at, value, Ordering::Relaxed));
}

#[derive(Clone, Debug)]
enum Step {
    Write(bool, usize),
    Read(bool, usize),
    /// A side is replaced by another one.
    Reattach(bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let len = || prop_oneof![4 => 0_usize..40, 3 => 40_usize..1500, 1 => Just(5000_usize)];
    proptest::collection::vec(
        prop_oneof![
            5 => (any::<bool>(), len()).prop_map(|(end, n)| Step::Write(end, n)),
            5 => (any::<bool>(), len()).prop_map(|(end, n)| Step::Read(end, n)),
            1 => any::<bool>().prop_map(Step::Reattach),
        ],
        1..150,
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 800, ..ProptestConfig::default() })]

    #[test]
    fn byte_ring_delivers_every_byte_once_in_order(which in 0_usize..2, starts: bool, a in start(), b in start(), steps in steps()) {
        let (input, output, attach_first, attach_second) = interfaces()[which];
        let mem = HeapMemory::pages(1);
        if starts {
            for at in [input.cons, input.prod] { set(&mem, at, a); }
            for at in [output.cons, output.prod] { set(&mem, at, b); }
        }
        let mut ends = [attach_first(mem.clone()).unwrap(), attach_second(mem.clone()).unwrap()];
        // Bytes in transit to each side.
        let mut on_way = [VecDeque::new(), VecDeque::new()];
        let sizes = [input.size as usize, output.size as usize];
        let mut next = 0_u8;
        for step in steps {
            match step {
                Step::Write(end, len) => {
                    let end = usize::from(end);
                    let bytes: Vec<u8> = (0..len).map(|i| next.wrapping_add((i * 7) as u8)).collect();
                    let room = sizes[1 - end] - on_way[1 - end].len();
                    prop_assert_eq!(ends[end].writable().unwrap() as usize, room);
                    let written = ends[end].write(&bytes).unwrap();
                    prop_assert_eq!(written, len.min(room));
                    on_way[1 - end].extend(&bytes[..written]);
                    next = next.wrapping_add(101);
                }
                Step::Read(end, len) => {
                    let end = usize::from(end);
                    let mut bytes = vec![0xee; len];
                    prop_assert_eq!(ends[end].readable().unwrap() as usize, on_way[end].len());
                    let got = ends[end].read(&mut bytes).unwrap();
                    prop_assert_eq!(got, len.min(on_way[end].len()));
                    let expected: Vec<u8> = on_way[end].drain(..got).collect();
                    prop_assert_eq!(&bytes[..got], &expected[..]);
                    prop_assert!(bytes[got..].iter().all(|b| *b == 0xee));
                }
                Step::Reattach(end) => {
                    let attach = if end { attach_second } else { attach_first };
                    ends[usize::from(end)] = attach(mem.clone()).unwrap();
                }
            }
        }
        // No byte outside the streams was changed.
        let mut rest = [0; 8];
        mem.read_bytes(4000, &mut rest).unwrap();
        prop_assert_eq!(rest, [0; 8]);
    }

    #[test]
    fn byte_ring_with_random_indices_moves_at_most_buffer_size(which in 0_usize..2, words: Vec<(u8, u32, i16)>, len in 0_usize..5000) {
        let (input, output, attach, _) = interfaces()[which];
        let mem = HeapMemory::pages(1);
        let mut end = attach(mem.clone()).unwrap();
        let (mut cons, mut prod) = (0_u32, 0_u32);
        for (at, value, near) in words {
            // The peer writes either side's index, with an arbitrary value or one near the valid
            // one.
            match at % 6 {
                0 => set(&mem, input.cons, value),
                1 => set(&mem, output.prod, value),
                2 => set(&mem, input.prod, value),
                3 => set(&mem, output.cons, value),
                4 => set(&mem, input.prod, cons.wrapping_add_signed(near.into())),
                _ => set(&mem, output.cons, prod.wrapping_add_signed(near.into())),
            }
            let claimed = mem.load_u32(input.prod, Ordering::Relaxed).unwrap();
            let honest = (0..=input.size).any(|n| cons.wrapping_add(n) == claimed);
            let mut bytes = vec![0; len];
            match end.read(&mut bytes) {
                Ok(got) => {
                    prop_assert!(honest && got <= input.size as usize);
                    cons = cons.wrapping_add(got as u32);
                }
                Err(RingFault::ProducerOverflow { .. }) => prop_assert!(!honest),
                Err(other) => prop_assert!(false, "{}", other),
            }
            let claimed = mem.load_u32(output.cons, Ordering::Relaxed).unwrap();
            let honest = (0..=output.size).any(|n| prod.wrapping_sub(n) == claimed);
            match end.write(&bytes) {
                Ok(put) => {
                    prop_assert!(honest && put <= output.size as usize);
                    prod = prod.wrapping_add(put as u32);
                }
                Err(fault) => {
                    prop_assert!(!honest);
                    prop_assert_eq!(fault.reason(), "ring-consumer-overrun");
                }
            }
        }
    }
}

#[test]
fn reset_empties_both_streams() {
    for (input, output, attach_first, attach_second) in interfaces() {
        let mem = HeapMemory::pages(1);
        for at in [input.cons, input.prod, output.cons, output.prod] {
            set(&mem, at, 0_u32.wrapping_sub(9));
        }
        let (mut first, mut second) =
            (attach_first(mem.clone()).unwrap(), attach_second(mem).unwrap());
        first.write(b"lost on the way").unwrap();
        second.write(b"this too").unwrap();
        second.reset();
        first.reattach();
        for ring in [&first, &second] {
            assert_eq!(ring.readable(), Ok(0));
        }
        assert_eq!((first.writable(), second.writable()), (Ok(output.size), Ok(input.size)));
        assert_eq!(first.write(b"new"), Ok(3));
        let mut bytes = [0; 8];
        assert_eq!(second.read(&mut bytes), Ok(3));
        assert_eq!(&bytes[..3], b"new");
    }
}

#[test]
fn byte_ring_with_invalid_layout_is_rejected() {
    let good = CONSOLE_IN;
    for bad in [
        StreamLayout { buffer: 4000, ..good },
        StreamLayout { buffer: usize::MAX, ..good },
        StreamLayout { size: 1000, ..good },
        StreamLayout { size: 0, ..good },
        StreamLayout { cons: 4096, ..good },
        StreamLayout { prod: 3077, ..good },
    ] {
        let fault = ByteRing::attach(HeapMemory::pages(1), bad, CONSOLE_OUT).unwrap_err();
        assert_eq!(fault.reason(), "ring-geometry", "{bad:?}");
        assert!(ByteRing::attach(HeapMemory::pages(1), CONSOLE_OUT, bad).is_err(), "{bad:?}");
    }
}

#[test]
fn memory_without_the_words_after_the_xenstore_rings_is_rejected() {
    let part = |len| Part::new(HeapMemory::pages(1), 0, len).unwrap();
    for attach in [ByteRing::xenstore_client, ByteRing::xenstore_server] {
        // `error`, the last word of `struct xenstore_domain_interface`, ends at byte 2076.
        assert_eq!(attach(part(2072)).unwrap_err().reason(), "ring-geometry");
        assert!(attach(part(2076)).is_ok());
    }
}
