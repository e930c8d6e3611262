//! The byte streams of the console (`io/console.h`) and of xenstore (`io/xs_wire.h`): one page with
//! a buffer and a pair of free-running indices for each direction.
//!
//! There is no event index. A side always notifies its peer after it has read or written bytes. So
//! a side that waits for data or for room is woken by each change of either.
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

/// Layout of one direction of a byte stream in its page; offsets are in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StreamLayout {
    /// Offset of the buffer.
    pub buffer: usize,
    /// Size of the buffer in bytes, a power of two.
    pub size: u32,
    /// Offset of the index of the next byte to be read.
    pub cons: usize,
    /// Offset of the index of the next byte to be written.
    pub prod: usize,
}

/// Input of the guest's console: `in` of `struct xencons_interface`.
pub const CONSOLE_IN: StreamLayout = StreamLayout { buffer: 0, size: 1024, cons: 3072, prod: 3076 };
/// Output of the guest's console: `out` of `struct xencons_interface`.
pub const CONSOLE_OUT: StreamLayout =
    StreamLayout { buffer: 1024, size: 2048, cons: 3080, prod: 3084 };
/// Requests to xenstored: `req` of `struct xenstore_domain_interface`.
pub const XENSTORE_REQ: StreamLayout =
    StreamLayout { buffer: 0, size: 1024, cons: 2048, prod: 2052 };
/// Responses from xenstored: `rsp` of `struct xenstore_domain_interface`.
pub const XENSTORE_RSP: StreamLayout =
    StreamLayout { buffer: 1024, size: 1024, cons: 2056, prod: 2060 };

/// Offset of `server_features` in `struct xenstore_domain_interface`.
pub const XENSTORE_SERVER_FEATURES: usize = 2064;
/// Offset of `connection` in `struct xenstore_domain_interface`.
pub const XENSTORE_CONNECTION: usize = 2068;
/// Offset of `error` in `struct xenstore_domain_interface`.
pub const XENSTORE_ERROR: usize = 2072;

/// One side of a pair of byte streams: it reads one stream and writes the other.
///
/// This side's indices are stored privately and only written to the page, so a peer that changes
/// them there has no effect. A fault makes the ring unusable: each call returns the same fault
/// until the peer restores a valid index.
#[derive(Debug)]
pub struct ByteRing<M> {
    mem: M,
    input: StreamLayout,
    output: StreamLayout,
    /// Index after the last byte read.
    cons: u32,
    /// Index after the last byte written.
    prod: u32,
}

impl<M: SharedMemory> ByteRing<M> {
    /// Attaches to a console as the guest.
    ///
    /// # Errors
    /// [`RingFault::Geometry`] if the memory is smaller than the interface, or read-only.
    pub fn console_frontend(mem: M) -> Result<Self, RingFault> {
        Self::attach(mem, CONSOLE_IN, CONSOLE_OUT)
    }

    /// Attaches to a guest's console as the terminal.
    ///
    /// # Errors
    /// As [`console_frontend`](Self::console_frontend).
    pub fn console_backend(mem: M) -> Result<Self, RingFault> {
        Self::attach(mem, CONSOLE_OUT, CONSOLE_IN)
    }

    /// Attaches to a xenstore ring as the client domain.
    ///
    /// # Errors
    /// As [`console_frontend`](Self::console_frontend).
    pub fn xenstore_client(mem: M) -> Result<Self, RingFault> {
        Self::attach_xenstore(mem, XENSTORE_RSP, XENSTORE_REQ)
    }

    /// Attaches to a domain's xenstore ring as xenstored.
    ///
    /// # Errors
    /// As [`console_frontend`](Self::console_frontend).
    pub fn xenstore_server(mem: M) -> Result<Self, RingFault> {
        Self::attach_xenstore(mem, XENSTORE_REQ, XENSTORE_RSP)
    }

    /// Attaches to a xenstore ring, whose memory also holds the words after the streams.
    fn attach_xenstore(
        mem: M,
        input: StreamLayout,
        output: StreamLayout,
    ) -> Result<Self, RingFault> {
        let (bytes, slot_size) = (mem.len(), input.size as usize);
        mem.load_u32(XENSTORE_ERROR, Ordering::Relaxed)
            .ok_or(RingFault::Geometry { bytes, slot_size })?;
        Self::attach(mem, input, output)
    }

    /// Attaches to a page, reading from `input` and writing to `output`, **at the indices stored in
    /// it**: they need not be 0, and pending data is preserved.
    ///
    /// # Errors
    /// [`RingFault::Geometry`] if a stream is not within the memory, its size is not a power of
    /// two, an index is not aligned, or the memory is read-only.
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

    /// Attaches again at the indices stored in the page, as [`attach`](Self::attach) does: the peer
    /// has reset them.
    pub fn reattach(&mut self) {
        self.cons = load(&self.mem, self.input.cons);
        self.prod = load(&self.mem, self.output.prod);
    }

    /// Empties both streams and resets all indices to 0, the peer's too. The peer must not access
    /// the page at the same time, and must [attach again](Self::reattach) afterwards.
    pub fn reset(&mut self) {
        for stream in [self.input, self.output] {
            for index in [stream.cons, stream.prod] {
                self.mem.store_u32(index, 0, Ordering::Release);
            }
        }
        (self.cons, self.prod) = (0, 0);
    }

    /// Returns the number of bytes that can be read now.
    ///
    /// # Errors
    /// [`RingFault::ProducerOverflow`] if the peer's index claims more bytes than the buffer holds.
    pub fn readable(&self) -> Result<u32, RingFault> {
        let prod = load(&self.mem, self.input.prod);
        let (ahead, most) = (prod.wrapping_sub(self.cons), self.input.size);
        if ahead > most {
            return Err(RingFault::ProducerOverflow { prod, ahead, most });
        }
        Ok(ahead)
    }

    /// Returns the number of bytes that can be written now.
    ///
    /// # Errors
    /// [`RingFault::ConsumerOverrun`] if the peer's index claims to have read bytes that were not
    /// written.
    pub fn writable(&self) -> Result<u32, RingFault> {
        let cons = load(&self.mem, self.output.cons);
        let (behind, most) = (self.prod.wrapping_sub(cons), self.output.size);
        // This subtraction validates `behind`.
        most.checked_sub(behind).ok_or(RingFault::ConsumerOverrun { cons, behind, most })
    }

    /// Reads the available bytes, at most `out.len()`, and returns their number. Notify the peer if
    /// it is not 0: the peer may wait for room.
    ///
    /// # Errors
    /// As [`readable`](Self::readable); nothing is read in that case.
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

    /// Writes as much of `from` as fits, and returns the number of bytes written. Notify the peer
    /// if it is not 0.
    ///
    /// # Errors
    /// As [`writable`](Self::writable); nothing is written in that case.
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

    /// Returns the shared memory.
    #[must_use]
    pub fn memory(&self) -> &M {
        &self.mem
    }
}

impl StreamLayout {
    /// Returns the location of `count` bytes from a free-running index: offset and length of the
    /// part up to the end of the buffer, and of the part at its beginning.
    fn split(&self, index: u32, count: usize) -> ((usize, usize), (usize, usize)) {
        let at = (index & self.size.wrapping_sub(1)) as usize;
        let to_end = (self.size as usize).wrapping_sub(at);
        let first = count.min(to_end);
        ((self.buffer.wrapping_add(at), first), (self.buffer, count.wrapping_sub(first)))
    }
}

/// Loads an index whose offset `attach` validated. Acquire: the peer's accesses to the buffer
/// happened before it stored the index.
fn load(mem: &impl SharedMemory, at: usize) -> u32 {
    mem.load_u32(at, Ordering::Acquire).unwrap_or_default()
}
