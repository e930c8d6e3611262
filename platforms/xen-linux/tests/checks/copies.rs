//! Copying.

use super::{Checks, Outcome, World, ensure, same, say};
use pvio_grant_table::{Access, CopyBuf, CopyOp, DomId, GrantCopier, GrantRef, GrantStatus};

pub fn checks() -> Checks<'static> {
    vec![
        ("copy: both directions at unaligned offsets", Box::new(both_ways)),
        ("copy: batch with invalid items reports a status for each", Box::new(mixed)),
        ("copy: batch larger than one ioctl accepts", Box::new(many)),
        ("copy: empty batch and zero bytes", Box::new(nothing)),
    ]
}

fn from(domain: DomId, gref: GrantRef, offset: usize, to: &mut [u8]) -> CopyOp<'_> {
    // So that a missing status is detected.
    let status = GrantStatus::NoSpace;
    CopyOp { domain, gref, offset, with: CopyBuf::FromGrant(to), status }
}

fn to(domain: DomId, gref: GrantRef, offset: usize, from: &[u8]) -> CopyOp<'_> {
    CopyOp { with: CopyBuf::ToGrant(from), ..self::from(domain, gref, offset, &mut []) }
}

fn both_ways(world: &mut World<'_>) -> Outcome {
    let gref = world.peer.grant(world.me.id(), 1, Access::ReadWrite)?[0];
    let peer = world.peer.id();
    let pattern: Vec<u8> = (0..4096_u32).map(|i| (i * 7 + i / 256) as u8).collect();
    // A buffer that starts and ends in the middle of a private page.
    let mut buffer = vec![0; 3 * 4096];
    buffer[1234..1234 + 4096].copy_from_slice(&pattern);
    let mut ops = [to(peer, gref, 0, &buffer[1234..1234 + 4096])];
    world.me.copy(&mut ops);
    same("status", ops[0].status, GrantStatus::Okay)?;
    same("the peer's page", world.peer.read(gref, 0, 1000)?, pattern[..1000].to_vec())?;
    same("end of the peer's page", world.peer.read(gref, 3596, 500)?, pattern[3596..].to_vec())?;
    let mut back = vec![0xee; 5000];
    let mut ops = [from(peer, gref, 1, &mut back[1..4096])];
    world.me.copy(&mut ops);
    same("status", ops[0].status, GrantStatus::Okay)?;
    ensure!(back[1..4096] == pattern[1..], "copied back data differs");
    same("bytes around the buffer", (back[0], back[4096]), (0xee, 0xee))?;
    let mut ops = [to(peer, gref, 4095, &[1])];
    world.me.copy(&mut ops);
    same("last byte of the page", world.peer.read(gref, 4094, 2)?, vec![pattern[4094], 1])
}

fn mixed(world: &mut World<'_>) -> Outcome {
    let good = world.peer.grant(world.me.id(), 1, Access::ReadWrite)?[0];
    let fixed = world.peer.grant(world.me.id(), 1, Access::ReadOnly)?[0];
    let peer = world.peer.id();
    world.peer.write(good, 10, b"good")?;
    world.peer.write(fixed, 10, b"fixed")?;
    let (mut a, mut b, mut c, mut d, mut e, mut f, mut g) =
        ([0; 4], [0; 5], [0; 4], [0; 8], [0; 1], [0; 9], [0; 4]);
    let mut ops = [
        from(peer, good, 10, &mut a),
        from(peer, GrantRef(u32::MAX - 5), 0, &mut c),
        from(peer, fixed, 10, &mut b),
        to(peer, fixed, 10, b"wrong"),
        from(peer, good, 4089, &mut d),
        from(peer, good, usize::MAX, &mut e),
        from(DomId(3000), good, 0, &mut f),
        to(peer, good, 20, b"too"),
        from(peer, good, 10, &mut g),
    ];
    world.me.copy(&mut ops);
    let statuses = ops.map(|op| op.status);
    use GrantStatus::{BadCopyArgument, BadDomain, BadGrantRef, GeneralError, Okay};
    let wanted = [
        Okay,
        BadGrantRef,
        Okay,
        // Xen's status for writing to a read-only grant.
        GeneralError,
        BadCopyArgument,
        BadCopyArgument,
        BadDomain,
        Okay,
        Okay,
    ];
    same("statuses", statuses, wanted)?;
    same("buffers of valid items", (&a, &b, &g), (b"good", b"fixed", b"good"))?;
    same("buffers of invalid items", (c, d, e, f), ([0; 4], [0; 8], [0; 1], [0; 9]))?;
    same("contents of the read-only page", world.peer.read(fixed, 10, 5)?, b"fixed".to_vec())?;
    same("contents of the written page", world.peer.read(good, 20, 3)?, b"too".to_vec())
}

fn many(world: &mut World<'_>) -> Outcome {
    let grefs = world.peer.grant(world.me.id(), 10, Access::ReadWrite)?;
    let peer = world.peer.id();
    let words: Vec<[u8; 2]> = (0..200_u16).map(u16::to_le_bytes).collect();
    let place = |i: usize| (grefs[i % 10], i / 10 * 16);
    let mut ops: Vec<_> = words
        .iter()
        .enumerate()
        .map(|(i, word)| {
            let (gref, at) = place(i);
            // Every fiftieth reference is invalid.
            to(peer, if i % 50 == 49 { GrantRef(0x7000) } else { gref }, at, word)
        })
        .collect();
    world.me.copy(&mut ops);
    for (i, op) in ops.iter().enumerate() {
        let wanted = if i % 50 == 49 { GrantStatus::BadGrantRef } else { GrantStatus::Okay };
        same(&format!("status of {i}"), op.status, wanted)?;
    }
    for (i, word) in words.iter().enumerate() {
        let (gref, at) = place(i);
        let wanted = if i % 50 == 49 { vec![0; 2] } else { word.to_vec() };
        if i % 7 == 0 || i % 50 == 49 {
            same(&format!("word {i}"), world.peer.read(gref, at, 2)?, wanted)?;
        }
    }
    Ok(())
}

fn nothing(world: &mut World<'_>) -> Outcome {
    let gref = world.peer.grant(world.me.id(), 1, Access::ReadWrite)?[0];
    world.me.copy(&mut []);
    let mut ops = [from(world.peer.id(), gref, 4096, &mut [])];
    world.me.copy(&mut ops);
    same("status", ops[0].status, GrantStatus::Okay).map_err(say)
}
