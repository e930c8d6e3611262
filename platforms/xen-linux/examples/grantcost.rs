//! Measures the cost of access to pages of another domain, for each way of access.
//!
//! ```text
//! grantcost peer DOMAIN NODE        grants 256 pages to DOMAIN, until told to end
//! grantcost measure DOMAIN NODE     measures against them; JSON lines
//! ```
//! `NODE` is a xenstore node that both domains may write (`/local/domain/<guest>/data/cost`). Times
//! are those of the guest's clock. In an emulator that counts instructions (QEMU's `-icount
//! shift=1,sleep=off`, in which an instruction takes 2 ns) they are exactly reproducible, but count
//! instructions only. The costs of caches, TLBs and hardware context switches are not included. A
//! `rep movsb`, which `memcpy` of shared memory uses here, counts once for each byte; copying in
//! words shows the cost without that.

use pvio_grant_table::{Access, CopyBuf, CopyOp, DomId, GrantCopier, GrantMapper, GrantRef};
use pvio_grant_table::{GrantStatus, Granter};
use pvio_ring::shm::{PAGE_SIZE, Region, SharedMemory};
use pvio_xen_linux::{Mapping, XenDomain};
use pvio_xenbus::Xenstore;
use serde_json::json;
use std::error::Error;
use std::hint::black_box;
use std::time::Instant;

type Fallible<T> = Result<T, Box<dyn Error>>;

/// Numbers of pages of one request: one, a request without indirect segments, a ring of 16 pages,
/// 32, a request of 88 (352 KiB), and the maximum.
const SIZES: [usize; 7] = [1, 4, 11, 16, 32, 88, 256];
/// Number of measured rounds for each way and size, after one warm-up round. The minimum counts,
/// since longer times include a timer interrupt or another domain.
const ROUNDS: usize = 12;

fn main() -> Fallible<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["peer", domain, node] => peer(DomId(domain.parse()?), node),
        ["measure", domain, node] => measure(DomId(domain.parse()?), node),
        _ => Err("grantcost peer|measure DOMAIN NODE".into()),
    }
}

fn peer(to: DomId, node: &str) -> Fallible<()> {
    let domain = XenDomain::open()?;
    let mut xs = domain.xenstore()?;
    let pages = domain.alloc_pages(256)?;
    let grefs: Result<Vec<_>, _> =
        (0..256).map(|page| domain.grant(to, &pages, page, Access::ReadWrite)).collect();
    let words: Vec<String> = grefs?.iter().map(ToString::to_string).collect();
    let end = format!("{node}/end");
    xs.watch(&end, "end")?;
    // Two nodes, since the size of a guest's values is limited.
    xs.write(&format!("{node}/0"), words[..128].join(" ").as_bytes())?;
    xs.write(&format!("{node}/1"), words[128..].join(" ").as_bytes())?;
    while xs.read_opt(&end)?.is_none() {
        xs.wait_event(None)?;
    }
    Ok(())
}

fn measure(from: DomId, node: &str) -> Fallible<()> {
    let domain = XenDomain::open()?;
    let mut xs = domain.xenstore()?;
    let last = format!("{node}/1");
    xs.watch(&last, "grefs")?;
    while xs.read_opt(&last)?.is_none() {
        xs.wait_event(None)?;
    }
    let words = [xs.read(&format!("{node}/0"))?, xs.read(&last)?].join(&b' ');
    let grefs: Result<Vec<_>, _> =
        String::from_utf8(words)?.split(' ').map(|word| word.parse().map(GrantRef)).collect();
    let grefs = grefs?;
    let kind = std::fs::read_to_string("/sys/hypervisor/guest_type")?;
    let mut costs =
        Costs { domain, from, buffer: vec![1; 257 * PAGE_SIZE], kind: kind.trim().to_owned() };
    for pages in SIZES {
        costs.all(&grefs[..pages])?;
    }
    costs.crowd(&grefs)?;
    xs.write(&format!("{node}/end"), b"1")?;
    Ok(())
}

struct Costs {
    domain: XenDomain,
    from: DomId,
    /// Contains 256 whole pages.
    buffer: Vec<u8>,
    kind: String,
}

impl Costs {
    fn all(&mut self, grefs: &[GrantRef]) -> Fallible<()> {
        let at = self.buffer.as_ptr().align_offset(PAGE_SIZE);
        let len = grefs.len() * PAGE_SIZE;
        for (way, reads) in [("copy from", true), ("copy to", false)] {
            let mut ops: Vec<CopyOp<'_>> = self.buffer[at..at + len]
                .chunks_mut(PAGE_SIZE)
                .zip(grefs)
                .map(|(page, gref)| CopyOp {
                    domain: self.from,
                    gref: *gref,
                    offset: 0,
                    with: if reads { CopyBuf::FromGrant(page) } else { CopyBuf::ToGrant(page) },
                    status: GrantStatus::Okay,
                })
                .collect();
            let domain = &self.domain;
            let best = least(|| {
                domain.copy(&mut ops);
                Ok(())
            })?;
            if let Some(bad) = ops.iter().find(|op| op.status != GrantStatus::Okay) {
                return Err(format!("{}: {}", bad.gref, bad.status).into());
            }
            self.tell(way, grefs.len(), best);
        }
        for access in [Access::ReadWrite, Access::ReadOnly] {
            let writes = access == Access::ReadWrite;
            let how = if writes { "rw" } else { "ro" };
            let each = least(|| {
                let mut mapped = Vec::with_capacity(grefs.len());
                self.domain.map_each(self.from, grefs, access, &mut |_, page| mapped.push(page));
                mapped.into_iter().try_for_each(|page| touch(&page?, writes))
            })?;
            self.tell(&format!("map_each {how}, touch, unmap"), grefs.len(), each);
            let map = least(|| touch(&self.domain.map(self.from, grefs, access)?, writes))?;
            self.tell(&format!("map {how}, touch, unmap"), grefs.len(), map);
        }
        let single = least(|| {
            let mut mapped = Vec::with_capacity(grefs.len());
            for gref in grefs {
                mapped.push(self.domain.map(self.from, &[*gref], Access::ReadWrite)?);
            }
            mapped.iter().try_for_each(|page| touch(page, true))
        })?;
        self.tell("map rw one by one, touch, unmap", grefs.len(), single);
        let kept = self.domain.map(self.from, grefs, Access::ReadWrite)?;
        let private = &mut self.buffer[at..at + len];
        let read = least(|| kept.read_bytes(0, private).ok_or_else(|| "out of range".into()))?;
        let write = least(|| kept.write_bytes(0, private).ok_or_else(|| "out of range".into()))?;
        let words = least(|| {
            for (i, page) in private.chunks_mut(PAGE_SIZE).enumerate() {
                kept.read_words(i * PAGE_SIZE, page).ok_or("out of range")?;
            }
            Ok(())
        })?;
        self.tell("kept mapped, memcpy from", grefs.len(), read);
        self.tell("kept mapped, memcpy to", grefs.len(), write);
        self.tell("kept mapped, copied from in words", grefs.len(), words);
        let touched = least(|| touch(&kept, true))?;
        self.tell("kept mapped, touch", grefs.len(), touched);
        Ok(())
    }

    /// Measures the cost of one page while others are mapped, each separately, through the same
    /// descriptor of the kernel or another one.
    fn crowd(&self, grefs: &[GrantRef]) -> Fallible<()> {
        let (one, others) = grefs.split_first().ok_or("no pages")?;
        let mut kept: Vec<Mapping> = Vec::new();
        for target in [0, 255, 1020, 4080] {
            while kept.len() < target {
                let gref = others[kept.len() % others.len()];
                kept.push(self.domain.map(self.from, &[gref], Access::ReadOnly)?);
            }
            for (whose, domain) in [("the same", &self.domain), ("another", &self.domain.clone())] {
                let cost =
                    least(|| touch(&domain.map(self.from, &[*one], Access::ReadWrite)?, true))?;
                self.tell(
                    &format!("map rw, touch, unmap; {target} kept through {whose} descriptor"),
                    1,
                    cost,
                );
            }
        }
        Ok(())
    }

    fn tell(&self, way: &str, pages: usize, ns: u64) {
        let per_page = ns as f64 / pages as f64;
        let line = json!({ "here": self.kind, "way": way, "pages": pages, "ns": ns,
            "ns_per_page": (per_page * 10.0).round() / 10.0 });
        println!("{line}");
    }
}

/// Reads each page, and writes to it if `writes` is set.
fn touch(memory: &Mapping, writes: bool) -> Fallible<()> {
    let mut word = [0; 8];
    for page in (0..memory.len()).step_by(PAGE_SIZE) {
        memory.read_words(page, &mut word).ok_or("out of range")?;
        black_box(word);
        if writes {
            memory.write_words(page, &word).ok_or("out of range")?;
        }
    }
    Ok(())
}

/// Returns the shortest time of one call, in nanoseconds.
fn least(mut call: impl FnMut() -> Fallible<()>) -> Fallible<u64> {
    call()?;
    let mut best = u64::MAX;
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        call()?;
        best = best.min(u64::try_from(begun.elapsed().as_nanos())?);
    }
    Ok(best)
}
