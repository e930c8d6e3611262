//! All copy policies copy the same bytes and return the same status for invalid copies.

use pvio_grant_table::policy::{CachedMappings, GrantsStay, Mapped};
use pvio_grant_table::{
    Access, CopyBuf, CopyOp, DomId, GrantCopier, GrantRef, GrantStatus, Granter,
};
use pvio_ring::shm::{PAGE_SIZE, Region};
use pvio_sim::local::memory::LocalPages;
use pvio_sim::{LocalDomain, LocalMachine};

const US: DomId = DomId(0);
const PEER: DomId = DomId(7);
const PAGES: usize = 100;
/// This page is granted read-only.
const READ_ONLY: usize = 5;

struct World {
    us: LocalDomain,
    peer: LocalDomain,
    pages: LocalPages,
    grefs: Vec<GrantRef>,
    _machine: LocalMachine,
}

impl World {
    fn new() -> Self {
        let machine = LocalMachine::new();
        let (us, peer) = (machine.domain(US), machine.domain(PEER));
        let pages = peer.alloc_pages(PAGES).unwrap();
        let grefs = (0..PAGES).map(|page| {
            let access = if page == READ_ONLY { Access::ReadOnly } else { Access::ReadWrite };
            pages.write_bytes(page * PAGE_SIZE, &[page as u8; PAGE_SIZE]).unwrap();
            peer.grant(US, &pages, page, access).unwrap()
        });
        let grefs = grefs.collect();
        Self { us, peer, pages, grefs, _machine: machine }
    }

    fn each_policy(&self, mut test: impl FnMut(&str, &dyn GrantCopier)) {
        test("the platform", &self.us);
        test("mapped", &Mapped::new(&self.us));
        assert_eq!(self.us.pages_mapped(), 0, "nothing stays mapped");
        let kept = CachedMappings::new(&self.us, 7, GrantsStay::promised_by_the_peer());
        test("kept", &kept);
        assert!(kept.len() <= 7 && self.us.pages_mapped() == kept.len());
        drop(kept);
        assert_eq!(self.us.pages_mapped(), 0);
    }
}

fn op(gref: GrantRef, offset: usize, with: CopyBuf<'_>) -> CopyOp<'_> {
    CopyOp { domain: PEER, gref, offset, with, status: GrantStatus::NoSpace }
}

#[test]
fn grant_copies_in_batches_of_any_size_move_correct_bytes_both_ways() {
    let world = World::new();
    world.each_policy(|name, copier| {
        for count in [0, 1, 2, 63, 64, 65, PAGES] {
            let mut bufs = vec![[0_u8; 96]; count];
            let ops = bufs.iter_mut().zip(&world.grefs);
            let mut ops: Vec<_> =
                ops.map(|(buf, gref)| op(*gref, 4000, CopyBuf::FromGrant(buf))).collect();
            copier.copy(&mut ops);
            assert!(ops.iter().all(|op| op.status == GrantStatus::Okay), "{name}");
            drop(ops);
            assert!(bufs.iter().enumerate().all(|(i, buf)| *buf == [i as u8; 96]), "{name}");
        }
        // A batch with both directions, and two copies to one page.
        let (mut there, here) = ([0; 4], [0xee; 8]);
        let mut ops = [
            op(world.grefs[9], 0, CopyBuf::ToGrant(&here)),
            op(world.grefs[9], 8, CopyBuf::ToGrant(&here[..4])),
            op(world.grefs[READ_ONLY], 8, CopyBuf::FromGrant(&mut there)),
            op(world.grefs[10], 4088, CopyBuf::ToGrant(&here)),
        ];
        copier.copy(&mut ops);
        assert!(ops.iter().all(|op| op.status == GrantStatus::Okay), "{name}");
        assert_eq!(there, [READ_ONLY as u8; 4]);
        let mut got = [0; 13];
        world.pages.read_bytes(9 * PAGE_SIZE, &mut got).unwrap();
        assert_eq!(
            got,
            [0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 9]
        );
        // Restored for the next policy.
        for page in [9, 10] {
            world.pages.write_bytes(page * PAGE_SIZE, &[page as u8; PAGE_SIZE]).unwrap();
        }
    });
}

#[test]
fn grant_copies_report_status_individually() {
    let world = World::new();
    world.each_policy(|name, copier| {
        let (mut a, mut b, mut c, mut d) = ([0; 8], [0; 8], [0; 8], [0; 8]);
        let data = [1; 8];
        let mut other = op(world.grefs[1], 0, CopyBuf::FromGrant(&mut d));
        other.domain = DomId(99);
        let mut ops = [
            op(world.grefs[1], 0, CopyBuf::FromGrant(&mut a)),
            op(GrantRef(u32::MAX), 0, CopyBuf::FromGrant(&mut b)),
            op(world.grefs[2], 4089, CopyBuf::FromGrant(&mut c)),
            op(world.grefs[READ_ONLY], 0, CopyBuf::ToGrant(&data)),
            op(world.grefs[2], usize::MAX, CopyBuf::ToGrant(&data)),
            other,
            op(world.grefs[2], 4096, CopyBuf::ToGrant(&[])),
        ];
        copier.copy(&mut ops);
        let [ok, bad_ref, crosses, read_only, far, domain, nothing] = ops.map(|op| op.status);
        assert_eq!((ok, nothing), (GrantStatus::Okay, GrantStatus::Okay), "{name}");
        assert_ne!(bad_ref, GrantStatus::Okay, "{name}");
        assert_eq!((crosses, far), (GrantStatus::BadCopyArgument, GrantStatus::BadCopyArgument));
        assert_ne!(read_only, GrantStatus::Okay, "{name}");
        assert_eq!(domain, GrantStatus::BadDomain, "{name}");
        assert_eq!(a, [1; 8]);
    });
}

#[test]
fn cached_mappings_are_mapped_once_and_evicted_by_clock() {
    let world = World::new();
    let kept = CachedMappings::new(&world.us, 4, GrantsStay::promised_by_the_peer());
    let touch = |page: usize| {
        let mut buf = [0; 8];
        let mut ops = [op(world.grefs[page], 0, CopyBuf::FromGrant(&mut buf))];
        kept.copy(&mut ops);
        assert_eq!((ops[0].status, buf), (GrantStatus::Okay, [page as u8; 8]));
    };
    // A cached page stays in use: its owner cannot end the grant.
    let is_kept = |page: usize| world.peer.end_access(world.grefs[page]).is_err();
    (20..24).for_each(touch);
    assert_eq!(world.us.pages_mapped(), 4);
    // One round of the clock algorithm clears the marks, and evicts the first page.
    touch(24);
    assert!(!is_kept(20) && (21..25).all(is_kept));
    (21..25).filter(|page| *page != 22).for_each(touch);
    touch(25);
    assert!(!is_kept(22) && [21, 23, 24, 25].into_iter().all(is_kept));
    kept.forget(PEER, world.grefs[21]);
    assert!(!is_kept(21));
    assert_eq!((kept.len(), world.us.pages_mapped()), (3, 3));
    // A page that was cached read-only is mapped again for writing.
    let mut ops = [op(world.grefs[23], 0, CopyBuf::ToGrant(&[9; 8]))];
    kept.copy(&mut ops);
    assert_eq!((ops[0].status, kept.len()), (GrantStatus::Okay, 3));
}
