//! What AF_XDP takes of the kernel: memory shared with it (`linux/if_xdp.h`), and the program and the
//! map that lead frames to a socket (`linux/bpf.h`).
//!
//! # Safety
//! Packet memory is cut into chunks of [`CHUNK`] bytes. A chunk belongs to one side at a time: to the
//! kernel from when its number is published in the fill or transmit ring until it comes back by the
//! receive or completion ring, to us at all other times, and only then is a slice of it made. The
//! rings' counters are atomics; their entries are read and written by value, on our side of the
//! counters only. Whatever comes from the kernel is still bounded before it is used.
#![allow(unsafe_code)]

use alloc::vec::Vec;
use core::ffi::CStr;
use core::marker::PhantomData;
use core::sync::atomic::{AtomicU32, Ordering};
use memmap2::{MmapMut, MmapOptions, MmapRaw};
use rustix::net::xdp::{XdpRingFlags, XdpRingOffset, XdpUmemReg, XdpUmemRegFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Bytes of a chunk: a page, which is the most that a frame may have (`xdp_umem_reg`).
const CHUNK: usize = 4096;
/// Chunks for each way, and entries of each ring.
pub const DEPTH: usize = 256;
/// Those to send with are the second half of the memory.
const OURS: core::ops::Range<u32> = DEPTH as u32..2 * DEPTH as u32;
/// Bytes of the first half.
const THEIRS: usize = DEPTH * CHUNK;
/// Bytes of the largest frame to be sent.
pub const FRAME: usize = CHUNK;

/// Where a frame lies (`struct xdp_desc`).
#[repr(C)]
#[derive(Clone, Copy)]
struct Desc {
    addr: u64,
    len: u32,
    options: u32,
}

/// One of a socket's rings. `T` is what its entries are: valid whatever their bytes.
struct Ring<T> {
    memory: MmapRaw,
    producer: usize,
    consumer: usize,
    flags: Option<usize>,
    entries: usize,
    /// Our counter.
    at: u32,
    _entries: PhantomData<T>,
}

impl<T: Copy> Ring<T> {
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
        // SAFETY: four aligned bytes of the mapping, by `map`; both sides use it atomically only.
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

    // Where we produce.

    /// Puts an entry there. There must be fewer of the ring's chunks than entries.
    fn push(&mut self, entry: T) {
        // SAFETY: it is not published, so the kernel does not look at it.
        unsafe { self.entry().write(entry) };
        self.at = self.at.wrapping_add(1);
        self.word(self.producer).store(self.at, Ordering::Release);
    }

    /// Whether the kernel has taken all of it.
    fn is_taken(&self) -> bool {
        self.word(self.consumer).load(Ordering::Acquire) == self.at
    }

    // Where the kernel does.

    fn is_empty(&self) -> bool {
        self.word(self.producer).load(Ordering::Acquire) == self.at
    }

    fn peek(&self) -> Option<T> {
        // SAFETY: the kernel has published it, and it is not given back yet.
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

/// A socket with its memory and its four rings, to be bound to a queue of an interface.
pub struct Socket {
    socket: OwnedFd,
    memory: MmapRaw,
    fill: Ring<u64>,
    completion: Ring<u64>,
    receive: Ring<Desc>,
    transmit: Ring<Desc>,
    /// Chunks to send with, by number: those that are ours.
    free: Vec<u32>,
}

impl Socket {
    /// One in this network namespace, that receives once it is bound and led to.
    ///
    /// # Errors
    /// What the system says; `EAFNOSUPPORT` if it knows no AF_XDP.
    pub fn new() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::XDP, SocketType::RAW, flags, None)?;
        let memory = MmapRaw::from(MmapMut::map_anon(2 * THEIRS)?);
        let registration = XdpUmemReg {
            addr: memory.as_mut_ptr().expose_provenance() as u64,
            len: memory.len() as u64,
            chunk_size: CHUNK as u32,
            headroom: 0,
            flags: XdpUmemRegFlags::empty(),
            tx_metadata_len: 0,
        };
        // The memory stays mapped until after the socket is closed: see `Drop`'s order, and the
        // kernel has pinned its pages besides.
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

    /// Chunks that a frame could be sent with at once.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes back what has been sent.
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

    /// Sends what `write` writes and tells the length of; `None` if nothing is free, or it wrote
    /// nothing.
    pub fn send(&mut self, write: impl FnOnce(&mut [u8]) -> Option<usize>) -> Option<()> {
        let chunk = self.free.pop()?;
        let at = (chunk as usize).saturating_mul(CHUNK);
        // SAFETY: a chunk of the mapping; it was free, so it is ours, and nobody else has a slice
        // of it for as long as it is neither free nor with the kernel.
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

    /// Whether all that was sent is taken by the kernel.
    pub fn is_taken(&self) -> bool {
        self.transmit.is_taken()
    }

    /// Whether the kernel wants to be told that there is something to send.
    pub fn wants_send(&self) -> bool {
        self.transmit.needs_wakeup()
    }

    /// Whether it wants to be told that there is room to receive.
    pub fn wants_receive(&self) -> bool {
        self.fill.needs_wakeup()
    }

    /// Whether nothing was received.
    pub fn is_empty(&self) -> bool {
        self.receive.is_empty()
    }

    /// Looks at the next frame that was received, and gives its chunk back.
    pub fn receive<R>(&mut self, look: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let desc = self.receive.peek()?;
        self.receive.give_back();
        let addr = usize::try_from(desc.addr).ok()?;
        let (start, len) = (addr % CHUNK, desc.len as usize);
        if addr >= THEIRS || start.saturating_add(len) > CHUNK {
            return None;
        }
        // SAFETY: inside one chunk of the mapping, which is ours since it came by this ring.
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

/// The program at an interface that leads each of its queues to the socket that is there for it, and
/// leaves the frames of others to the kernel. It goes away with this, however the process ends.
#[derive(Debug)]
pub struct Program {
    map: OwnedFd,
    _link: OwnedFd,
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

/// The beginnings of `union bpf_attr`'s parts; what follows counts as 0.
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
}

#[repr(C)]
struct MapUpdate {
    map_fd: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Runs `bpf(2)`.
///
/// # Safety
/// `A` is what `command` takes, without padding, and every address in it is valid for what the
/// command does with it.
unsafe fn bpf<A>(command: u32, attr: &A) -> io::Result<RawFd> {
    // SAFETY: the kernel reads `size_of::<A>()` bytes; the rest by the caller's promise.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, attr, size_of::<A>()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done as RawFd) }
}

/// The same for a command that makes a descriptor.
///
/// # Safety
/// As [`bpf`].
unsafe fn bpf_make<A>(command: u32, attr: &A) -> io::Result<OwnedFd> {
    // SAFETY: by the caller's promise; a descriptor that was made for us is ours.
    unsafe { bpf(command, attr).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

/// `struct bpf_insn`.
fn instruction(code: u8, to: u8, from: u8, offset: i16, value: i32) -> [u8; 8] {
    let registers = if cfg!(target_endian = "big") { to << 4 | from } else { from << 4 | to };
    let ([a, b], [c, d, e, f]) = (offset.to_ne_bytes(), value.to_ne_bytes());
    [code, registers, a, b, c, d, e, f]
}

impl Program {
    /// Puts it at an interface of this network namespace, with places for so many queues.
    ///
    /// # Errors
    /// What the system says; `EBUSY` if there is a program already.
    pub fn attach(interface: u32, queues: u32) -> io::Result<Self> {
        // SAFETY: type, sizes of key and value, entries; no address.
        let map = unsafe { bpf_make(MAP_CREATE, &[MAP_TYPE_XSKMAP, 4, 4, queues]) }?;
        let program = [
            // r2 = ctx->rx_queue_index
            instruction(0x61, 2, 1, 16, 0),
            // r1 = the map (BPF_PSEUDO_MAP_FD), of two places
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
        // SAFETY: so many instructions and a terminated string, which live for as long as the call.
        let program = unsafe { bpf_make(PROG_LOAD, &load) }?;
        let at = |flags| {
            let words = [program.as_raw_fd() as u32, interface, ATTACH_XDP, flags];
            // SAFETY: program, interface, kind, flags; no address.
            unsafe { bpf_make(LINK_CREATE, &words) }
        };
        // In the driver; else, for drivers that cannot, behind it.
        let link = at(0).or_else(|error| match error.raw_os_error() {
            Some(libc::EBUSY | libc::EEXIST | libc::EPERM) => Err(error),
            _ => at(FLAG_SKB_MODE),
        })?;
        Ok(Self { map, _link: link })
    }

    /// Leads a queue's frames to a socket that is bound to it, for as long as the socket is there.
    ///
    /// # Errors
    /// What the system says.
    pub fn lead(&self, queue: u32, socket: &Socket) -> io::Result<()> {
        let value = socket.socket.as_raw_fd();
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
