//! Granting.

use super::{Checks, Outcome, World, ensure, ranges_of, same, say};
use pvio_grant_table::{Access, GrantError, GrantStatus, Granter};
use pvio_ring::shm::{PAGE_SIZE, Region, SharedMemory};

pub fn checks() -> Checks<'static> {
    vec![
        ("grant: contents persist when access is granted and ended", Box::new(contents)),
        ("grant: page in use cannot be granted again", Box::new(once)),
        ("grant: kernel limit is reported and recovers", Box::new(limit)),
        ("grant: no pages and pages outside the memory are rejected", Box::new(bounds)),
        ("grant: granted pages outlive their owner", Box::new(outlive)),
    ]
}

fn contents(world: &mut World<'_>) -> Outcome {
    let me = &world.me;
    let pages = me.alloc_pages(3).map_err(say)?;
    let mut all = vec![0xff; 3 * PAGE_SIZE];
    pages.read_bytes(0, &mut all).ok_or("out of range")?;
    ensure!(all.iter().all(|byte| *byte == 0), "not zeroed");
    let pattern: Vec<u8> = (0..3 * PAGE_SIZE).map(|i| (i / 5) as u8).collect();
    pages.write_bytes(0, &pattern).ok_or("out of range")?;
    let base = pages.base();
    let before = ranges_of("gntalloc");
    let gref = me.grant(world.peer.id(), &pages, 1, Access::ReadWrite).map_err(say)?;
    same("address ranges", ranges_of("gntalloc") - before, 1)?;
    pages.read_bytes(0, &mut all).ok_or("out of range")?;
    ensure!(all == pattern, "contents changed by the grant");
    me.end_access(gref).map_err(say)?;
    same("address ranges after", ranges_of("gntalloc"), before)?;
    pages.read_bytes(0, &mut all).ok_or("out of range")?;
    ensure!(all == pattern, "contents changed by the end of access");
    same("address", pages.base(), base)?;
    me.end_access(gref).map_err(say)
}

fn once(world: &mut World<'_>) -> Outcome {
    let (me, to) = (&world.me, world.peer.id());
    let pages = me.alloc_pages(1).map_err(say)?;
    let gref = me.grant(to, &pages, 0, Access::ReadWrite).map_err(say)?;
    let again = me.grant(to, &pages, 0, Access::ReadOnly);
    same("again", again, Err(GrantError::Refused(GrantStatus::BadPage)))?;
    me.end_access(gref).map_err(say)?;
    let gref = me.grant(to, &pages, 0, Access::ReadOnly).map_err(say)?;
    me.end_access(gref).map_err(say)
}

fn limit(world: &mut World<'_>) -> Outcome {
    let node = "/sys/module/xen_gntalloc/parameters/limit";
    let limit: usize = std::fs::read_to_string(node).map_err(say)?.trim().parse().map_err(say)?;
    let (me, to) = (&world.me, world.peer.id());
    let pages = me.alloc_pages(limit + 1).map_err(say)?;
    let mut grefs = Vec::new();
    let end = loop {
        match me.grant(to, &pages, grefs.len(), Access::ReadWrite) {
            Ok(gref) => grefs.push(gref),
            Err(error) => break error,
        }
    };
    for gref in &grefs {
        me.end_access(*gref).map_err(say)?;
    }
    same("at the limit", (end, grefs.len()), (GrantError::OutOfEntries, limit))?;
    let gref = me.grant(to, &pages, limit, Access::ReadWrite).map_err(say)?;
    me.end_access(gref).map_err(say)
}

fn bounds(world: &mut World<'_>) -> Outcome {
    let me = &world.me;
    same("none", me.alloc_pages(0).map(|_| ()), Err(GrantError::NotOurs))?;
    let huge = me.alloc_pages(usize::MAX / PAGE_SIZE).map(|_| ());
    same("too many", huge, Err(GrantError::OutOfPages))?;
    let pages = me.alloc_pages(1).map_err(say)?;
    let outside = me.grant(world.peer.id(), &pages, 1, Access::ReadOnly);
    same("outside", outside, Err(GrantError::NotOurs))
}

fn outlive(world: &mut World<'_>) -> Outcome {
    let me = &world.me;
    let pages = me.alloc_pages(2).map_err(say)?;
    let before = ranges_of("gntalloc");
    let gref = me.grant(world.peer.id(), &pages, 0, Access::ReadWrite).map_err(say)?;
    drop(pages);
    same("while granted", ranges_of("gntalloc") - before, 1)?;
    me.end_access(gref).map_err(say)?;
    same("after", ranges_of("gntalloc"), before)
}
