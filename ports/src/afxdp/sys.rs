//! Kernel interfaces of AF_XDP: shared memory (`linux/if_xdp.h`), and the BPF program and map that
//! redirect frames to a socket (`linux/bpf.h`).
//!
//! # Safety
//! Packet memory is divided into chunks of [`CHUNK`] bytes. A chunk has one owner at a time. It
//! belongs to the kernel from when its number is published in the fill or transmit ring until it is
//! returned by the receive or completion ring. It belongs to this process at all other times, and
//! only then is a slice of it created. The rings' indices are accessed as atomics. Their entries
//! are read and written by value, and only those that the indices assign to this process. Every
//! value from the kernel is checked against its bounds before it is used.
#![allow(unsafe_code)]

use alloc::vec::Vec;
use bytemuck::{NoUninit, Pod, Zeroable};
use core::ffi::CStr;
use core::marker::PhantomData;
use core::sync::atomic::{AtomicU32, Ordering};
use memmap2::{MmapMut, MmapOptions, MmapRaw};
use rustix::net::sockopt;
use rustix::net::xdp::{XdpRingFlags, XdpRingOffset, XdpUmemReg, XdpUmemRegFlags};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Size of a chunk in bytes: a page, which is the largest size (`xdp_umem_reg`).
const CHUNK: usize = 4096;
/// Number of chunks for each direction, and of entries of each ring.
pub const DEPTH: usize = 256;
/// Chunks for sending: the second half of the memory.
const OURS: core::ops::Range<u32> = DEPTH as u32..2 * DEPTH as u32;
/// Size of the first half, for receiving, in bytes.
const THEIRS: usize = DEPTH * CHUNK;
/// Size of the largest frame to be sent, in bytes.
pub const FRAME: usize = CHUNK;

/// Location of a frame (`struct xdp_desc`).
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Desc {
    addr: u64,
    len: u32,
    options: u32,
}

/// One of a socket's rings. `T` is the type of its entries.
struct Ring<T> {
    memory: MmapRaw,
    producer: usize,
    consumer: usize,
    flags: Option<usize>,
    entries: usize,
    /// Index of this process in the ring.
    at: u32,
    _entries: PhantomData<T>,
}

impl<T: Pod> Ring<T> {
    /// Maps a ring of [`DEPTH`] entries.
    fn map(socket: &OwnedFd, place: u64, offsets: &XdpRingOffset) -> io::Result<Self> {
        let at = |offset: u64| usize::try_from(offset).map_err(|_| odd());
        let (producer, consumer) = (at(offsets.producer)?, at(offsets.consumer)?);
        let (entries, flags) = (at(offsets.desc)?, offsets.flags.map(at).transpose()?);
        let len = size_of::<T>().checked_mul(DEPTH).and_then(|n| n.checked_add(entries));
        let len = len.ok_or_else(odd)?;
        let fits = |at: usize, align: usize| at.is_multiple_of(align);
        let words = [Some(producer), Some(consumer), flags];
        let inside = |at: &usize| *at <= len.saturating_sub(4) && fits(*at, 4);
        if !words.iter().flatten().all(inside) || !fits(entries, align_of::<T>()) {
            return Err(odd());
        }
        let memory = MmapOptions::new().offset(place).len(len).map_raw(socket.as_raw_fd())?;
        Ok(Self { memory, producer, consumer, flags, entries, at: 0, _entries: PhantomData })
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        // SAFETY: four aligned bytes of the mapping, by `map`; this process and the kernel access
        // them only atomically.
        unsafe { AtomicU32::from_ptr(self.memory.as_mut_ptr().add(at).cast()) }
    }

    fn entry(&self) -> *mut T {
        let index = self.at as usize % DEPTH;
        // SAFETY: the mapping holds `DEPTH` aligned entries from there on, by `map`.
        unsafe { self.memory.as_mut_ptr().add(self.entries).cast::<T>().add(index) }
    }

    fn needs_wakeup(&self) -> bool {
        let flags = self.flags.map_or(0, |at| self.word(at).load(Ordering::Relaxed));
        flags & XdpRingFlags::XDP_RING_NEED_WAKEUP.bits() != 0
    }

    // Methods of rings that this process produces: fill and transmit.

    /// Publishes an entry. The caller must ensure that the ring is not full: there are no more
    /// chunks than entries.
    fn push(&mut self, entry: T) {
        // SAFETY: the entry is not published, so the kernel does not access it.
        unsafe { self.entry().write(entry) };
        self.at = self.at.wrapping_add(1);
        self.word(self.producer).store(self.at, Ordering::Release);
    }

    /// Whether the kernel has taken every entry.
    fn is_taken(&self) -> bool {
        self.word(self.consumer).load(Ordering::Acquire) == self.at
    }

    // Methods of rings that the kernel produces: receive and completion.

    fn is_empty(&self) -> bool {
        self.word(self.producer).load(Ordering::Acquire) == self.at
    }

    fn peek(&self) -> Option<T> {
        // SAFETY: the kernel has published the entry, and it is not released yet. Every bit pattern
        // is a value of `T`.
        (!self.is_empty()).then(|| unsafe { self.entry().read() })
    }

    fn give_back(&mut self) {
        self.at = self.at.wrapping_add(1);
        self.word(self.consumer).store(self.at, Ordering::Release);
    }
}

fn odd() -> io::Error {
    io::Error::other("the kernel's rings are not what they are known to be")
}

/// Socket with its memory and its four rings, to be bound to a queue of an interface.
pub struct Socket {
    socket: OwnedFd,
    memory: MmapRaw,
    fill: Ring<u64>,
    completion: Ring<u64>,
    receive: Ring<Desc>,
    transmit: Ring<Desc>,
    /// Numbers of the chunks for sending that are free: those that this process owns.
    free: Vec<u32>,
}

impl Socket {
    /// Gives an AF_XDP socket its memory and its rings. It receives once it is bound and frames are
    /// redirected to it. Needs no capability: the memory counts to `RLIMIT_MEMLOCK`.
    ///
    /// # Errors
    /// A system error.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        let memory = MmapRaw::from(MmapMut::map_anon(2 * THEIRS)?);
        let registration = XdpUmemReg {
            addr: memory.as_mut_ptr().expose_provenance() as u64,
            len: memory.len() as u64,
            chunk_size: CHUNK as u32,
            headroom: 0,
            flags: XdpUmemRegFlags::empty(),
            tx_metadata_len: 0,
        };
        // The memory stays mapped until after the socket is closed, by the order in `Drop`. The
        // kernel has also pinned its pages.
        sockopt::set_xdp_umem_reg(&socket, registration)?;
        sockopt::set_xdp_umem_fill_ring_size(&socket, DEPTH as u32)?;
        sockopt::set_xdp_umem_completion_ring_size(&socket, DEPTH as u32)?;
        sockopt::set_xdp_rx_ring_size(&socket, DEPTH as u32)?;
        sockopt::set_xdp_tx_ring_size(&socket, DEPTH as u32)?;
        let offsets = sockopt::xdp_mmap_offsets(&socket)?;
        // `XDP_UMEM_PGOFF_*` and `XDP_PGOFF_*`.
        let mut fill = Ring::map(&socket, 0x1_0000_0000, &offsets.fr)?;
        let completion = Ring::map(&socket, 0x1_8000_0000, &offsets.cr)?;
        let receive = Ring::map(&socket, 0, &offsets.rx)?;
        let transmit = Ring::map(&socket, 0x8000_0000, &offsets.tx)?;
        (0..THEIRS).step_by(CHUNK).for_each(|addr| fill.push(addr as u64));
        let free = OURS.collect();
        Ok(Self { socket, memory, fill, completion, receive, transmit, free })
    }

    /// Returns the number of chunks that are free for sending.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Frees the chunks of sent frames.
    pub fn reap(&mut self) {
        while let Some(addr) = self.completion.peek() {
            self.completion.give_back();
            let chunk = addr.checked_div(CHUNK as u64).and_then(|n| u32::try_from(n).ok());
            let chunk = chunk.filter(|chunk| OURS.contains(chunk));
            if let Some(chunk) = chunk
                && self.free.len() < DEPTH
            {
                self.free.push(chunk);
            }
        }
    }

    /// Queues the frame that `write` writes and returns the length of. Returns `None` if no chunk
    /// is free or nothing was written.
    pub fn send(&mut self, write: impl FnOnce(&mut [u8]) -> Option<usize>) -> Option<()> {
        let chunk = self.free.pop()?;
        let at = (chunk as usize).saturating_mul(CHUNK);
        // SAFETY: a chunk of the mapping. It was free, so this process owns it, and no other slice
        // of it exists for as long as it is neither free nor owned by the kernel.
        let bytes =
            unsafe { core::slice::from_raw_parts_mut(self.memory.as_mut_ptr().add(at), CHUNK) };
        match write(bytes).filter(|len| *len <= CHUNK) {
            Some(len) => {
                self.transmit.push(Desc { addr: at as u64, len: len as u32, options: 0 });
                Some(())
            }
            None => {
                self.free.push(chunk);
                None
            }
        }
    }

    /// Whether the kernel has taken all queued frames.
    pub fn is_taken(&self) -> bool {
        self.transmit.is_taken()
    }

    /// Whether the kernel needs a wake-up to send.
    pub fn wants_send(&self) -> bool {
        self.transmit.needs_wakeup()
    }

    /// Whether the kernel needs a wake-up to use chunks of the fill ring.
    pub fn wants_receive(&self) -> bool {
        self.fill.needs_wakeup()
    }

    /// Whether no frame was received.
    pub fn is_empty(&self) -> bool {
        self.receive.is_empty()
    }

    /// Calls `look` with the next received frame, then returns its chunk to the kernel.
    pub fn receive<R>(&mut self, look: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let desc = self.receive.peek()?;
        self.receive.give_back();
        let addr = usize::try_from(desc.addr).ok()?;
        let (start, len) = (addr % CHUNK, desc.len as usize);
        if addr >= THEIRS || start.saturating_add(len) > CHUNK {
            return None;
        }
        // SAFETY: inside one chunk of the mapping, which this process owns since it was returned by
        // this ring.
        let frame = unsafe { core::slice::from_raw_parts(self.memory.as_ptr().add(addr), len) };
        let seen = look(frame);
        self.fill.push(addr.saturating_sub(start) as u64);
        Some(seen)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// BPF program on an interface that redirects the frames of each queue to the socket registered for
/// it, and passes the frames of other queues to the kernel. The kernel removes it when the last
/// process that has a descriptor of its attachment closes that or ends.
#[derive(Debug)]
pub struct Program {
    map: OwnedFd,
    link: OwnedFd,
}

const MAP_CREATE: u32 = 0;
const MAP_UPDATE_ELEM: u32 = 2;
const PROG_LOAD: u32 = 5;
const LINK_CREATE: u32 = 28;
const MAP_TYPE_XSKMAP: u32 = 17;
const PROG_TYPE_XDP: u32 = 6;
const ATTACH_XDP: u32 = 37;
const FLAG_SKB_MODE: u32 = 2;
const LICENSE: &CStr = c"Apache-2.0 OR MIT";

/// Leading fields of the parts of `union bpf_attr`; missing fields are 0.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct MapUpdate {
    map_fd: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Calls `bpf(2)`.
///
/// # Safety
/// `A` must be the argument type of `command`, and every address in it must be valid for the
/// command's access.
unsafe fn bpf<A: NoUninit>(command: u32, attr: &A) -> io::Result<RawFd> {
    // SAFETY: the kernel reads `size_of::<A>()` bytes, all initialized; the rest holds by the caller's promise.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, attr, size_of::<A>()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done as RawFd) }
}

/// Calls `bpf(2)` with a command that returns a new descriptor.
///
/// # Safety
/// As [`bpf`].
unsafe fn bpf_make<A: NoUninit>(command: u32, attr: &A) -> io::Result<OwnedFd> {
    // SAFETY: by the caller's promise; a descriptor that the command created is owned by this
    // process.
    unsafe { bpf(command, attr).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

/// `struct bpf_insn`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// Bit fields `dst_reg` and `src_reg`.
    registers: u8,
    off: i16,
    imm: i32,
}

fn instruction(code: u8, to: u8, from: u8, off: i16, imm: i32) -> Instruction {
    let registers = if cfg!(target_endian = "big") { to << 4 | from } else { from << 4 | to };
    Instruction { code, registers, off, imm }
}

impl Program {
    /// Attaches the program to an interface of this network namespace, with a map of `queues`
    /// entries.
    ///
    /// # Errors
    /// A system error; `EBUSY` if there is an XDP program already.
    pub fn attach(interface: u32, queues: u32) -> io::Result<Self> {
        // SAFETY: type, sizes of key and value, number of entries; no address.
        let map = unsafe { bpf_make(MAP_CREATE, &[MAP_TYPE_XSKMAP, 4, 4, queues]) }?;
        let program = [
            // r2 = ctx->rx_queue_index
            instruction(0x61, 2, 1, 16, 0),
            // r1 = the map (BPF_PSEUDO_MAP_FD); takes two instructions
            instruction(0x18, 1, 1, 0, map.as_raw_fd()),
            instruction(0, 0, 0, 0, 0),
            // r3 = XDP_PASS, for a queue without a socket
            instruction(0xb7, 3, 0, 0, 2),
            // return bpf_redirect_map(r1, r2, r3)
            instruction(0x85, 0, 0, 0, 51),
            instruction(0x95, 0, 0, 0, 0),
        ];
        let load = ProgLoad {
            prog_type: PROG_TYPE_XDP,
            insn_cnt: program.len() as u32,
            insns: program.as_ptr().expose_provenance() as u64,
            license: LICENSE.as_ptr().expose_provenance() as u64,
        };
        // SAFETY: the instructions and a terminated string, with their correct lengths, which live
        // for as long as the call.
        let program = unsafe { bpf_make(PROG_LOAD, &load) }?;
        let at = |flags| {
            let words = [program.as_raw_fd() as u32, interface, ATTACH_XDP, flags];
            // SAFETY: program, interface, type, flags; no address.
            unsafe { bpf_make(LINK_CREATE, &words) }
        };
        // In the driver, or, for drivers that do not support it, in the generic (skb) mode.
        let link = at(0).or_else(|error| match error.raw_os_error() {
            Some(libc::EBUSY | libc::EEXIST | libc::EPERM) => Err(error),
            _ => at(FLAG_SKB_MODE),
        })?;
        Ok(Self { map, link })
    }

    /// Returns the program that another process attached.
    pub const fn from_descriptors(link: OwnedFd, map: OwnedFd) -> Self {
        Self { map, link }
    }

    /// Returns descriptors of the attachment and the map, in this order. The program stays attached
    /// until all descriptors of its attachment are closed.
    ///
    /// # Errors
    /// The system has no descriptor.
    pub fn descriptors(&self) -> io::Result<[OwnedFd; 2]> {
        Ok([self.link.try_clone()?, self.map.try_clone()?])
    }

    /// Redirects a queue's frames to a socket once that is bound to it, until it is closed. Frames
    /// are dropped until it is bound.
    ///
    /// # Errors
    /// A system error.
    pub fn lead(&self, queue: u32, socket: &OwnedFd) -> io::Result<()> {
        let value = socket.as_raw_fd();
        let update = MapUpdate {
            map_fd: self.map.as_raw_fd() as u32,
            _pad: 0,
            key: (&raw const queue).expose_provenance() as u64,
            value: (&raw const value).expose_provenance() as u64,
            flags: 0,
        };
        // SAFETY: a key and a value of four bytes each, which live for as long as the call.
        unsafe { bpf(MAP_UPDATE_ELEM, &update) }.map(drop)
    }
}
