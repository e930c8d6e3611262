//! Mapping and copying pages granted by other domains.

use crate::domain::Domain;
use crate::mem::{self, Held, Keeper, Mapped};
use crate::peers::PeerMemory;
use pvio_grant_table::{
    Access, CopyBuf, CopyOp, DomId, GrantCopier, GrantMapper, GrantRef, GrantStatus,
};
use pvio_ring::shm::{PAGE_SIZE, Region};
use std::sync::Arc;

/// Pages of another domain, in use until dropped. They stay readable even if that domain is
/// destroyed.
pub type Mapping = Held<Pin>;

/// Largest number of pages in one mapping.
const MOST_PAGES: usize = 1024;

/// Marks the pages of a [`Mapping`] as in use.
#[derive(Debug)]
pub struct Pin {
    peer: Arc<PeerMemory>,
    pinned: Pinned,
}

#[derive(Debug)]
enum Pinned {
    One(GrantRef),
    Many(Box<Many>),
}

#[derive(Debug, Default)]
struct Many {
    grefs: Vec<GrantRef>,
    /// Contiguous mapping of the pages, if they are not contiguous in the peer's memory.
    stitched: Option<Mapped>,
}

impl Drop for Pin {
    #[inline]
    fn drop(&mut self) {
        match &mut self.pinned {
            Pinned::One(gref) => self.peer.unpin(*gref),
            Pinned::Many(many) => {
                // The mapping must be removed before the pages are released.
                many.stitched = None;
                many.grefs.iter().for_each(|gref| self.peer.unpin(*gref));
            }
        }
        self.peer.used();
    }
}

// SAFETY: either mapping is in an allocation that is never replaced, and stays until `drop`.
#[allow(unsafe_code)]
unsafe impl Keeper for Pin {
    #[inline]
    fn memory(&self) -> &Mapped {
        match &self.pinned {
            Pinned::Many(many) => many.stitched.as_ref().unwrap_or(&self.peer.memory.mapped),
            Pinned::One(_) => &self.peer.memory.mapped,
        }
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
fn map_one(peer: Arc<PeerMemory>, gref: GrantRef, access: Access) -> Result<Mapping, GrantStatus> {
    let frame = peer.pin(gref, access)?;
    let pin = Pin { peer, pinned: Pinned::One(gref) };
    hold(pin, frame as usize * PAGE_SIZE, PAGE_SIZE, access)
}

#[cold]
fn map_many(
    peer: Arc<PeerMemory>,
    grefs: &[GrantRef],
    access: Access,
) -> Result<Mapping, GrantStatus> {
    if grefs.is_empty() || grefs.len() > MOST_PAGES {
        return Err(GrantStatus::NoSpace);
    }
    let (mut many, mut frames) = (Box::<Many>::default(), Vec::with_capacity(grefs.len()));
    for gref in grefs {
        match peer.pin(*gref, access) {
            Ok(frame) => frames.push(frame),
            Err(status) => {
                many.grefs.iter().for_each(|gref| peer.unpin(*gref));
                return Err(status);
            }
        }
        many.grefs.push(*gref);
    }
    let (first, len) = (frames[0], frames.len() * PAGE_SIZE);
    let mut pin = Pin { peer, pinned: Pinned::Many(many) };
    if frames.iter().zip(first..).all(|(frame, expected)| *frame == expected) {
        return hold(pin, first as usize * PAGE_SIZE, len, access);
    }
    let file_len = pin.peer.memory.frames.len();
    let writable = access == Access::ReadWrite;
    let stitched = Mapped::stitched(&pin.peer.file, file_len, &frames, writable);
    let stitched = Some(stitched.map_err(|_| GrantStatus::NoSpace)?);
    if let Pinned::Many(many) = &mut pin.pinned {
        many.stitched = stitched;
    }
    hold(pin, 0, len, access)
}

#[inline]
fn hold(pin: Pin, offset: usize, len: usize, access: Access) -> Result<Mapping, GrantStatus> {
    mem::hold(pin, offset, len, access == Access::ReadWrite).ok_or(GrantStatus::BadPage)
}

impl GrantCopier for Domain {
    fn copy(&self, ops: &mut [CopyOp<'_>]) {
        let mut last: Option<(DomId, Arc<PeerMemory>)> = None;
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

fn copy_one(
    peer: &PeerMemory,
    gref: GrantRef,
    offset: usize,
    with: &mut CopyBuf<'_>,
) -> GrantStatus {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Request, Status};
    use crate::{DomainConfig, Hypervisor};
    use core::sync::atomic::Ordering;
    use pvio_grant_table::Granter;

    fn two(hypervisor: &Hypervisor) -> [Domain; 2] {
        ["front", "back"].map(|name| {
            let config = DomainConfig::new(name).memory_pages(64);
            let id = hypervisor.create_domain(config).unwrap();
            Domain::join(hypervisor.state_dir(), id).unwrap()
        })
    }

    #[test]
    fn grant_of_unsharable_frame_is_bad_page() {
        let dir = tempfile::tempdir().unwrap();
        let hypervisor = Hypervisor::start(dir.path()).unwrap();
        let [front, back] = two(&hypervisor);
        let page = front.alloc_pages(1).unwrap();
        let gref = front.grant(back.id(), &page, 0, Access::ReadWrite).unwrap();
        let at = PAGE_SIZE + gref.0 as usize * 8 + 4;
        let memory = &front.own().unwrap().memory.memory.mapped;
        // Frame 0 holds the state, 1 to 8 are the grant table, 9 to 72 are sharable.
        for frame in [0, 1, 8, 73, u32::MAX] {
            assert!(memory.store_u32(at, frame, Ordering::SeqCst));
            let mapped = back.map(front.id(), &[gref], Access::ReadWrite);
            assert_eq!(mapped.err(), Some(GrantStatus::BadPage), "frame {frame}");
        }
        for frame in [9, 72] {
            assert!(memory.store_u32(at, frame, Ordering::SeqCst));
            assert!(back.map(front.id(), &[gref], Access::ReadWrite).is_ok(), "frame {frame}");
        }
        front.end_access(gref).unwrap();
    }

    #[test]
    fn memory_request_without_any_grant_is_rejected() {
        let dir = tempfile::tempdir().unwrap();
        let hypervisor = Hypervisor::start(dir.path()).unwrap();
        let [front, back] = two(&hypervisor);
        let page = front.alloc_pages(1).unwrap();
        let ask = || back.inner().connection.call::<2>(&Request::Memory(front.id())).unwrap().0;
        front.grant(DomId(700), &page, 0, Access::ReadWrite).unwrap();
        assert_eq!(ask().status, Status::NothingGranted);
        front.grant(back.id(), &page, 0, Access::ReadOnly).unwrap();
        assert_eq!(ask().status, Status::Done);
    }
}
