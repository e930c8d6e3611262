//! Mapping and copying pages other domains granted.

use crate::domain::Domain;
use crate::mem::{self, Held, Keeper, Mapped};
use crate::peers::Peer;
use pvio_grant_table::{
    Access, CopyBuf, CopyOp, DomId, GrantCopier, GrantMapper, GrantRef, GrantStatus,
};
use pvio_ring::shm::{PAGE_SIZE, Region};
use std::sync::Arc;

/// Pages of another domain, in use until dropped; they stay readable even when that domain dies.
pub type Mapping = Held<Pin>;

/// Most pages in one mapping.
const MOST_PAGES: usize = 1024;

/// Keeps the pages of a [`Mapping`] in use.
#[derive(Debug)]
pub struct Pin {
    peer: Arc<Peer>,
    grefs: Grefs,
    stitched: Option<Mapped>,
}

#[derive(Debug)]
enum Grefs {
    One(GrantRef),
    Many(Vec<GrantRef>),
}

impl Drop for Pin {
    #[inline]
    fn drop(&mut self) {
        match &self.grefs {
            Grefs::One(gref) => self.peer.unpin(*gref),
            Grefs::Many(grefs) => {
                // Nothing may point to the pages any more when they are let go of.
                self.stitched = None;
                grefs.iter().for_each(|gref| self.peer.unpin(*gref));
            }
        }
        self.peer.used();
    }
}

// SAFETY: either mapping is a field that nothing but `drop` changes, or in an `Arc` that nothing
// replaces.
#[allow(unsafe_code)]
unsafe impl Keeper for Pin {
    #[inline]
    fn memory(&self) -> &Mapped {
        self.stitched.as_ref().unwrap_or(&self.peer.memory.mapped)
    }
}

impl GrantMapper for Domain {
    type Mapping = Mapping;

    fn map(
        &self,
        domain: DomId,
        grefs: &[GrantRef],
        access: Access,
    ) -> Result<Mapping, GrantStatus> {
        let peer = self.peer(domain)?;
        match grefs {
            [gref] => map_one(peer, *gref, access),
            _ => map_many(peer, grefs, access),
        }
    }

    fn map_each(
        &self,
        domain: DomId,
        grefs: &[GrantRef],
        access: Access,
        each: &mut dyn FnMut(usize, Result<Mapping, GrantStatus>),
    ) {
        let peer = self.peer(domain);
        for (i, gref) in grefs.iter().enumerate() {
            each(i, peer.clone().and_then(|peer| map_one(peer, *gref, access)));
        }
    }
}

#[inline]
fn map_one(peer: Arc<Peer>, gref: GrantRef, access: Access) -> Result<Mapping, GrantStatus> {
    let frame = peer.pin(gref, access)?;
    let pin = Pin { peer, grefs: Grefs::One(gref), stitched: None };
    hold(pin, frame as usize * PAGE_SIZE, PAGE_SIZE, access)
}

#[cold]
fn map_many(peer: Arc<Peer>, grefs: &[GrantRef], access: Access) -> Result<Mapping, GrantStatus> {
    if grefs.is_empty() || grefs.len() > MOST_PAGES {
        return Err(GrantStatus::NoSpace);
    }
    let mut pin = Pin { peer, grefs: Grefs::Many(Vec::with_capacity(grefs.len())), stitched: None };
    let mut frames = Vec::with_capacity(grefs.len());
    for gref in grefs {
        // On failure `pin` lets go of what was pinned so far.
        frames.push(pin.peer.pin(*gref, access)?);
        if let Grefs::Many(pinned) = &mut pin.grefs {
            pinned.push(*gref);
        }
    }
    let (first, len) = (frames[0], frames.len() * PAGE_SIZE);
    if frames.iter().zip(first..).all(|(frame, expected)| *frame == expected) {
        return hold(pin, first as usize * PAGE_SIZE, len, access);
    }
    let file_len = pin.peer.memory.frames.len();
    let writable = access == Access::ReadWrite;
    let stitched = Mapped::stitched(&pin.peer.file, file_len, &frames, writable);
    pin.stitched = Some(stitched.map_err(|_| GrantStatus::NoSpace)?);
    hold(pin, 0, len, access)
}

#[inline]
fn hold(pin: Pin, offset: usize, len: usize, access: Access) -> Result<Mapping, GrantStatus> {
    mem::hold(pin, offset, len, access == Access::ReadWrite).ok_or(GrantStatus::BadPage)
}

impl GrantCopier for Domain {
    fn copy(&self, ops: &mut [CopyOp<'_>]) {
        let mut last: Option<(DomId, Arc<Peer>)> = None;
        for op in ops {
            let known = last.take().filter(|(domain, _)| *domain == op.domain);
            let peer = known.map_or_else(|| self.peer(op.domain), |(_, peer)| Ok(peer));
            op.status = match peer {
                Ok(peer) => {
                    let status = copy_one(&peer, op.gref, op.offset, &mut op.with);
                    last = Some((op.domain, peer));
                    status
                }
                Err(status) => status,
            };
        }
    }
}

fn copy_one(peer: &Peer, gref: GrantRef, offset: usize, with: &mut CopyBuf<'_>) -> GrantStatus {
    let (len, access) = match with {
        CopyBuf::FromGrant(buf) => (buf.len(), Access::ReadOnly),
        CopyBuf::ToGrant(buf) => (buf.len(), Access::ReadWrite),
    };
    if offset.checked_add(len).is_none_or(|end| end > PAGE_SIZE) {
        return GrantStatus::BadCopyArgument;
    }
    let frame = match peer.pin(gref, access) {
        Ok(frame) => frame,
        Err(status) => return status,
    };
    let (at, memory) = (frame as usize * PAGE_SIZE + offset, &peer.memory.mapped);
    let done = match with {
        CopyBuf::FromGrant(buf) => memory.read_bytes(at, buf),
        CopyBuf::ToGrant(buf) => memory.write_bytes(at, buf),
    };
    peer.unpin(gref);
    if done.is_some() { GrantStatus::Okay } else { GrantStatus::BadPage }
}
