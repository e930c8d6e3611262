//! Mapping.

use super::{Checks, LOST, Outcome, World, ensure, ranges_of, same, say};
use pvio_grant_table::{Access, DomId, GrantMapper, GrantRef, GrantStatus};
use pvio_ring::shm::{PAGE_SIZE, Region, SharedMemory};
use pvio_xen_linux::{Mapping, XenDomain};
use std::time::{Duration, Instant};

pub fn checks() -> Checks<'static> {
    vec![
        ("map: pages are contiguous, readable and writable", Box::new(ring)),
        ("map: more pages than one ioctl accepts", Box::new(large)),
        ("map: bad reference maps nothing and returns its status", Box::new(all_or_none)),
        ("map: domain that does not exist is rejected", Box::new(no_domain)),
        ("map: read-only mapping cannot be written", Box::new(read_only)),
        ("map: writable mapping of a read-only grant is rejected", Box::new(read_only_grant)),
        ("map: no page and too many pages are rejected", Box::new(bounds)),
        ("map_each: valid batch uses one address range", Box::new(each_good)),
        ("map_each: batch with invalid references reports a status for each", Box::new(each_mixed)),
        ("map_each: more pages than one ioctl accepts", Box::new(each_large)),
        ("map: dropped mapping is unmapped in the hypervisor", Box::new(unmapped)),
        (
            "map: mapping of an ended grant stays readable and separate from the owner's page",
            Box::new(ended),
        ),
        ("map: mappings of cloned handles are independent", Box::new(clones)),
    ]
}

/// Returns the check for a domain that cannot map its own grants.
pub fn refused_here() -> Checks<'static> {
    vec![("map: own grants of the domain are rejected", Box::new(own_refused))]
}

type Each = Vec<Result<Mapping, GrantStatus>>;

fn map_each(me: &XenDomain, from: DomId, grefs: &[GrantRef], access: Access) -> Each {
    let mut all = Vec::new();
    me.map_each(from, grefs, access, &mut |i, mapped| {
        assert_eq!(i, all.len(), "indices not reported once and in order");
        all.push(mapped);
    });
    all
}

fn byte(memory: &impl SharedMemory, at: usize) -> Option<u8> {
    let mut byte = [0];
    memory.read_bytes(at, &mut byte).map(|()| byte[0])
}

/// Grants pages whose first byte is their number.
fn numbered(world: &mut World<'_>, count: usize, access: Access) -> Result<Vec<GrantRef>, String> {
    let grefs = world.peer.grant(world.me.id(), count, access)?;
    for (i, gref) in grefs.iter().enumerate() {
        world.peer.write(*gref, 0, &[i as u8])?;
    }
    Ok(grefs)
}

fn ring(world: &mut World<'_>) -> Outcome {
    let grefs = numbered(world, 4, Access::ReadWrite)?;
    let mapping = world.me.map(world.peer.id(), &grefs, Access::ReadWrite).map_err(say)?;
    same("length", mapping.len(), 4 * PAGE_SIZE)?;
    for i in 0..4 {
        same("first byte", byte(&mapping, i * PAGE_SIZE), Some(i as u8))?;
        mapping.write_bytes(i * PAGE_SIZE + 4088, &[0xa0 + i as u8; 8]).ok_or("not writable")?;
    }
    for (i, gref) in grefs.iter().enumerate() {
        same("what the peer sees", world.peer.read(*gref, 4088, 8)?, vec![0xa0 + i as u8; 8])?;
    }
    world.peer.write(grefs[3], 100, b"later")?;
    let mut seen = [0; 5];
    mapping.read_bytes(3 * PAGE_SIZE + 100, &mut seen).ok_or("out of range")?;
    same("what the peer wrote later", &seen, b"later")
}

fn large(world: &mut World<'_>) -> Outcome {
    let grefs = world.peer.grant(world.me.id(), 300, Access::ReadWrite)?;
    let marked = [0, 255, 256, 299];
    for i in marked {
        world.peer.write(grefs[i], 7, &[i as u8 | 1])?;
    }
    let before = ranges_of("gntdev");
    let mapping = world.me.map(world.peer.id(), &grefs, Access::ReadWrite).map_err(say)?;
    same("address ranges", ranges_of("gntdev") - before, 2)?;
    for i in marked {
        same("a byte", byte(&mapping, i * PAGE_SIZE + 7), Some(i as u8 | 1))?;
    }
    drop(mapping);
    same("address ranges after", ranges_of("gntdev"), before)
}

/// Returns a reference that was not granted.
fn nobody() -> GrantRef {
    GrantRef(u32::MAX - 5)
}

fn all_or_none(world: &mut World<'_>) -> Outcome {
    let grefs = numbered(world, 2, Access::ReadWrite)?;
    let before = ranges_of("gntdev");
    let asked = [grefs[0], nobody(), grefs[1]];
    let mapped = world.me.map(world.peer.id(), &asked, Access::ReadWrite);
    same("status", mapped.err(), Some(GrantStatus::BadGrantRef))?;
    same("address ranges", ranges_of("gntdev"), before)
}

fn no_domain(world: &mut World<'_>) -> Outcome {
    for domain in [DomId(3000), DomId(0x7ff4)] {
        let mapped = world.me.map(domain, &[GrantRef(8)], Access::ReadOnly);
        same("status", mapped.err(), Some(GrantStatus::BadDomain))?;
    }
    Ok(())
}

fn read_only(world: &mut World<'_>) -> Outcome {
    let grefs = numbered(world, 2, Access::ReadWrite)?;
    let mapping = world.me.map(world.peer.id(), &grefs, Access::ReadOnly).map_err(say)?;
    ensure!(!mapping.writable(), "mapping reports that it is writable");
    same("a byte", byte(&mapping, PAGE_SIZE), Some(1))?;
    ensure!(mapping.write_bytes(0, &[1]).is_none(), "write to a read-only mapping succeeded");
    let maps = std::fs::read_to_string("/proc/self/maps").map_err(say)?;
    let at = format!("{:x}-", mapping.base().as_ptr() as usize);
    let line = maps.lines().find(|line| line.starts_with(&at)).ok_or("not in /proc/self/maps")?;
    ensure!(line.contains(" r--s "), "address range is not read-only: {line}");
    Ok(())
}

fn read_only_grant(world: &mut World<'_>) -> Outcome {
    let grefs = numbered(world, 2, Access::ReadOnly)?;
    let from = world.peer.id();
    let refused = world.me.map(from, &grefs, Access::ReadWrite);
    same("status", refused.err(), Some(GrantStatus::PermissionDenied))?;
    for mapped in map_each(&world.me, from, &grefs, Access::ReadWrite) {
        same("status of each", mapped.err(), Some(GrantStatus::PermissionDenied))?;
    }
    let mapping = world.me.map(from, &grefs, Access::ReadOnly).map_err(say)?;
    same("a byte", byte(&mapping, PAGE_SIZE), Some(1))
}

fn bounds(world: &mut World<'_>) -> Outcome {
    let from = world.peer.id();
    for grefs in [&[] as &[GrantRef], &[GrantRef(8); 1025]] {
        let mapped = world.me.map(from, grefs, Access::ReadOnly);
        same("status", mapped.err(), Some(GrantStatus::NoSpace))?;
    }
    ensure!(
        map_each(&world.me, from, &[], Access::ReadOnly).is_empty(),
        "mappings for an empty list"
    );
    Ok(())
}

fn each_good(world: &mut World<'_>) -> Outcome {
    let grefs = numbered(world, 16, Access::ReadWrite)?;
    let before = ranges_of("gntdev");
    let mut mapped = map_each(&world.me, world.peer.id(), &grefs, Access::ReadWrite);
    same("pages", mapped.len(), 16)?;
    same("address ranges", ranges_of("gntdev") - before, 1)?;
    for (i, page) in mapped.iter().enumerate() {
        let page = page.as_ref().map_err(say)?;
        same("length", page.len(), PAGE_SIZE)?;
        same("a byte", byte(page, 0), Some(i as u8))?;
        page.write_bytes(9, &[i as u8 ^ 0xff]).ok_or("not writable")?;
        ensure!(
            page.write_bytes(PAGE_SIZE, &[1]).is_none(),
            "write beyond the end of the page succeeded"
        );
    }
    for (i, gref) in grefs.iter().enumerate() {
        same("what the peer sees", world.peer.read(*gref, 9, 1)?, vec![i as u8 ^ 0xff])?;
    }
    // The last mapping keeps all pages mapped.
    let last = mapped.remove(7).map_err(say)?;
    drop(mapped);
    same("byte of the last mapping", byte(&last, 0), Some(7))?;
    drop(last);
    same("address ranges after", ranges_of("gntdev"), before)
}

fn each_mixed(world: &mut World<'_>) -> Outcome {
    let good = numbered(world, 3, Access::ReadWrite)?;
    let fixed = world.peer.grant(world.me.id(), 1, Access::ReadOnly)?[0];
    let other = world.peer.grant(DomId(3000), 1, Access::ReadWrite)?[0];
    let asked = [good[0], nobody(), good[1], fixed, other, good[2], GrantRef(0x7000)];
    let before = ranges_of("gntdev");
    let mapped = map_each(&world.me, world.peer.id(), &asked, Access::ReadWrite);
    let statuses: Vec<_> = mapped.iter().map(|page| page.as_ref().err().copied()).collect();
    let out_of_table = Some(GrantStatus::BadGrantRef);
    same("statuses of valid references", [statuses[0], statuses[2], statuses[5]], [None; 3])?;
    same("status of references beyond the table", [statuses[1], statuses[6]], [out_of_table; 2])?;
    same("read-only", statuses[3], Some(GrantStatus::PermissionDenied))?;
    // Xen returns no more specific status for an entry of another domain.
    same("status of another domain's grant", statuses[4], Some(GrantStatus::GeneralError))?;
    for (i, at) in [0, 2, 5].into_iter().enumerate() {
        let page = mapped[at].as_ref().map_err(say)?;
        same("a byte", byte(page, 0), Some(i as u8))?;
    }
    drop(mapped);
    same("address ranges after", ranges_of("gntdev"), before)
}

fn each_large(world: &mut World<'_>) -> Outcome {
    let grefs = world.peer.grant(world.me.id(), 300, Access::ReadWrite)?;
    for i in [0, 255, 256, 299] {
        world.peer.write(grefs[i], 0, &[i as u8 | 1])?;
    }
    let before = ranges_of("gntdev");
    let mapped = map_each(&world.me, world.peer.id(), &grefs, Access::ReadWrite);
    same("address ranges", ranges_of("gntdev") - before, 2)?;
    same("pages", mapped.iter().filter(|page| page.is_ok()).count(), 300)?;
    for i in [0, 255, 256, 299] {
        same("a byte", byte(mapped[i].as_ref().map_err(say)?, 0), Some(i as u8 | 1))?;
    }
    Ok(())
}

/// An entry in use cannot be ended, so an entry that could be ended is not in use.
fn unmapped(world: &mut World<'_>) -> Outcome {
    let from = world.peer.id();
    for round in 0..10 {
        let grefs = numbered(world, 12, Access::ReadWrite)?;
        let ring = world.me.map(from, &grefs[..4], Access::ReadWrite).map_err(say)?;
        let batch = map_each(&world.me, from, &grefs[4..], Access::ReadOnly);
        ensure!(batch.iter().all(Result::is_ok), "round {round}: not mapped");
        drop((ring, batch));
        world.peer.end(&grefs)?;
        for gref in &grefs {
            let again = world.me.map(from, &[*gref], Access::ReadOnly);
            ensure!(again.is_err(), "round {round}: {gref} can be mapped after its grant ended");
        }
        world.peer.forget()?;
    }
    Ok(())
}

fn ended(world: &mut World<'_>) -> Outcome {
    let grefs = numbered(world, 1, Access::ReadWrite)?;
    let from = world.peer.id();
    world.peer.write(grefs[0], 0, b"old")?;
    let mapping = world.me.map(from, &grefs, Access::ReadWrite).map_err(say)?;
    world.peer.end(&grefs)?;
    same("contents of the owner's page", world.peer.read(grefs[0], 0, 3)?, b"old".to_vec())?;
    world.peer.write(grefs[0], 0, b"new")?;
    same("contents of the mapping", byte(&mapping, 0), Some(b'o'))?;
    mapping.write_bytes(0, b"!").ok_or("not writable")?;
    same("contents of the owner's page", world.peer.read(grefs[0], 0, 3)?, b"new".to_vec())?;
    // The entry stays unchanged for that time; the kernel tries to end it later.
    let again = world.me.map(from, &grefs, Access::ReadOnly).map_err(say)?;
    same("contents of a second mapping", byte(&again, 0), Some(b'!'))?;
    drop((mapping, again));
    let until = Instant::now() + LOST;
    while let Ok(page) = world.me.map(from, &grefs, Access::ReadOnly) {
        drop(page);
        ensure!(Instant::now() < until, "the old page can still be mapped after the timeout");
        std::thread::sleep(Duration::from_millis(300));
    }
    Ok(())
}

fn clones(world: &mut World<'_>) -> Outcome {
    let grefs = numbered(world, 2, Access::ReadWrite)?;
    let from = world.peer.id();
    let clone = world.me.clone();
    let a = clone.map(from, &grefs[..1], Access::ReadWrite).map_err(say)?;
    let b = world.me.map(from, &grefs[..1], Access::ReadWrite).map_err(say)?;
    a.write_bytes(3, &[7]).ok_or("not writable")?;
    same("byte written through the other mapping", byte(&b, 3), Some(7))?;
    drop(clone);
    same("byte after the clone was dropped", byte(&a, 3), Some(7))
}

fn own_refused(world: &mut World<'_>) -> Outcome {
    let grefs = numbered(world, 2, Access::ReadWrite)?;
    for domain in [world.me.id(), DomId::SELF] {
        let refused = world.me.map(domain, &grefs, Access::ReadWrite);
        same("status", refused.err(), Some(GrantStatus::BadDomain))?;
        for mapped in map_each(&world.me, domain, &grefs, Access::ReadOnly) {
            same("status of each", mapped.err(), Some(GrantStatus::BadDomain))?;
        }
    }
    same("contents of the page", world.peer.read(grefs[1], 0, 2)?, vec![1, 0])
}
