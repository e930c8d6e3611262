//! The byte streams of the console (`io/console.h`) and of xenstore (`io/xs_wire.h`): in one page,
//! a buffer each way and a pair of free-running indices for each.
//!
//! There is no event index. Whoever has moved bytes, in or out, notifies the peer, always; so a side
//! that found nothing to do and waits is woken by whatever changes that.
//!
//! ```
//! use pvio_ring::byte_ring::ByteRing;
//! use pvio_ring::shm::HeapMemory;
//!
//! let page = HeapMemory::pages(1);
//! let mut guest = ByteRing::console_frontend(page.clone())?;
//! let mut terminal = ByteRing::console_backend(page)?;
//!
//! assert_eq!(guest.write(b"hello")?, 5);
//! let mut text = [0; 16];
//! assert_eq!(terminal.read(&mut text)?, 5);
//! assert_eq!(&text[..5], b"hello");
//! # Ok::<(), pvio_ring::RingFault>(())
//! ```

use crate::layout::RingFault;
use crate::shm::{Region, SharedMemory};
use core::sync::atomic::Ordering;

/// Where one direction of a byte stream is in its page; offsets in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StreamLayout {
    /// The buffer.
    pub buffer: usize,
    /// Bytes of the buffer, a power of two.
    pub size: u32,
    /// The index of the next byte to be read.
    pub cons: usize,
    /// The index of the next byte to be written.
    pub prod: usize,
}

/// To the guest's console: `in` of `struct xencons_interface`.
pub const CONSOLE_IN: StreamLayout = StreamLayout { buffer: 0, size: 1024, cons: 3072, prod: 3076 };
/// From the guest's console: `out` of `struct xencons_interface`.
pub const CONSOLE_OUT: StreamLayout =
    StreamLayout { buffer: 1024, size: 2048, cons: 3080, prod: 3084 };
/// To xenstored: `req` of `struct xenstore_domain_interface`.
pub const XENSTORE_REQ: StreamLayout =
    StreamLayout { buffer: 0, size: 1024, cons: 2048, prod: 2052 };
/// From xenstored: `rsp` of `struct xenstore_domain_interface`.
pub const XENSTORE_RSP: StreamLayout =
    StreamLayout { buffer: 1024, size: 1024, cons: 2056, prod: 2060 };

/// One end of a pair of byte streams: reads the one, writes the other.
///
/// Our own indices are kept here and only ever written to the page, so a peer that changes them
/// there changes nothing. A fault ends the ring: the same fault is found again until the peer
/// takes its lie back.
#[derive(Debug)]
pub struct ByteRing<M> {
    mem: M,
    input: StreamLayout,
    output: StreamLayout,
    /// Bytes read, as an index.
    cons: u32,
    /// Bytes written, as an index.
    prod: u32,
}

impl<M: SharedMemory> ByteRing<M> {
    /// The guest's end of its console.
    ///
    /// # Errors
    /// [`RingFault::Geometry`] when the memory is smaller than the interface, or read-only.
    pub fn console_frontend(mem: M) -> Result<Self, RingFault> {
        Self::attach(mem, CONSOLE_IN, CONSOLE_OUT)
    }

    /// The terminal's end of a guest's console.
    ///
    /// # Errors
    /// As [`console_frontend`](Self::console_frontend).
    pub fn console_backend(mem: M) -> Result<Self, RingFault> {
        Self::attach(mem, CONSOLE_OUT, CONSOLE_IN)
    }

    /// A domain's end of its connection to xenstored.
    ///
    /// # Errors
    /// As [`console_frontend`](Self::console_frontend).
    pub fn xenstore_client(mem: M) -> Result<Self, RingFault> {
        Self::attach(mem, XENSTORE_RSP, XENSTORE_REQ)
    }

    /// xenstored's end of its connection to a domain.
    ///
    /// # Errors
    /// As [`console_frontend`](Self::console_frontend).
    pub fn xenstore_server(mem: M) -> Result<Self, RingFault> {
        Self::attach(mem, XENSTORE_REQ, XENSTORE_RSP)
    }

    /// Attaches to a page that reads from `input` and writes to `output`, going on **at the indices
    /// found in it**: they need not be 0, and what is waiting is not lost.
    ///
    /// # Errors
    /// [`RingFault::Geometry`] when a stream is not inside the memory, its size no power of two or
    /// an index not aligned, or when the memory is read-only.
    pub fn attach(mem: M, input: StreamLayout, output: StreamLayout) -> Result<Self, RingFault> {
        for stream in [input, output] {
            let bytes = mem.len();
            let fault = RingFault::Geometry { bytes, slot_size: stream.size as usize };
            let inside =
                stream.buffer.checked_add(stream.size as usize).is_some_and(|e| e <= bytes);
            if !mem.writable() || !inside || !stream.size.is_power_of_two() {
                return Err(fault);
            }
            for index in [stream.cons, stream.prod] {
                mem.load_u32(index, Ordering::Relaxed).ok_or(fault)?;
            }
        }
        let cons = load(&mem, input.cons);
        let prod = load(&mem, output.prod);
        Ok(Self { mem, input, output, cons, prod })
    }

    /// Bytes that can be read now.
    ///
    /// # Errors
    /// [`RingFault::ProducerOverflow`] when the peer claims to have written more than fits.
    pub fn readable(&self) -> Result<u32, RingFault> {
        let prod = load(&self.mem, self.input.prod);
        let (ahead, most) = (prod.wrapping_sub(self.cons), self.input.size);
        if ahead > most {
            return Err(RingFault::ProducerOverflow { prod, ahead, most });
        }
        Ok(ahead)
    }

    /// Bytes that can be written now.
    ///
    /// # Errors
    /// [`RingFault::ConsumerOverrun`] when the peer claims to have read what was never written.
    pub fn writable(&self) -> Result<u32, RingFault> {
        let cons = load(&self.mem, self.output.cons);
        let (behind, most) = (self.prod.wrapping_sub(cons), self.output.size);
        // The subtraction is what checks that `behind` is possible.
        most.checked_sub(behind).ok_or(RingFault::ConsumerOverrun { cons, behind, most })
    }

    /// Reads what is there, as much as `out` holds, and returns how many bytes that was. Notify the
    /// peer if it was any: it may wait for room.
    ///
    /// # Errors
    /// As [`readable`](Self::readable); nothing is read then.
    pub fn read(&mut self, out: &mut [u8]) -> Result<usize, RingFault> {
        let count = out.len().min(self.readable()? as usize);
        let (first, second) = self.input.split(self.cons, count);
        let (head, tail) = out.split_at_mut_checked(first.1).unwrap_or_default();
        let tail = tail.get_mut(..second.1).unwrap_or_default();
        let moved = self.mem.read_bytes(first.0, head).and(self.mem.read_bytes(second.0, tail));
        debug_assert!(moved.is_some(), "the buffer was checked when the ring was made");
        self.cons = self.cons.wrapping_add(count as u32);
        // Release: the bytes are copied before the peer may overwrite them.
        self.mem.store_u32(self.input.cons, self.cons, Ordering::Release);
        Ok(count)
    }

    /// Writes as much of `from` as there is room for, and returns how many bytes that was. Notify
    /// the peer if it was any.
    ///
    /// # Errors
    /// As [`writable`](Self::writable); nothing is written then.
    pub fn write(&mut self, from: &[u8]) -> Result<usize, RingFault> {
        let count = from.len().min(self.writable()? as usize);
        let (first, second) = self.output.split(self.prod, count);
        let (head, tail) = from.split_at_checked(first.1).unwrap_or_default();
        let tail = tail.get(..second.1).unwrap_or_default();
        let moved = self.mem.write_bytes(first.0, head).and(self.mem.write_bytes(second.0, tail));
        debug_assert!(moved.is_some(), "the buffer was checked when the ring was made");
        self.prod = self.prod.wrapping_add(count as u32);
        // Release: the bytes are there before the peer may read them.
        self.mem.store_u32(self.output.prod, self.prod, Ordering::Release);
        Ok(count)
    }

    /// The shared memory.
    #[must_use]
    pub fn memory(&self) -> &M {
        &self.mem
    }
}

impl StreamLayout {
    /// Where `count` bytes from a free-running index are: offset and length of the part up to the
    /// end of the buffer, and of the rest at its beginning.
    fn split(&self, index: u32, count: usize) -> ((usize, usize), (usize, usize)) {
        let at = (index & self.size.wrapping_sub(1)) as usize;
        let to_end = (self.size as usize).wrapping_sub(at);
        let first = count.min(to_end);
        ((self.buffer.wrapping_add(at), first), (self.buffer, count.wrapping_sub(first)))
    }
}

/// Loads an index that `attach` has shown to exist. Acquire: what the peer did to the buffer before
/// it moved the index is done.
fn load(mem: &impl SharedMemory, at: usize) -> u32 {
    mem.load_u32(at, Ordering::Acquire).unwrap_or_default()
}
