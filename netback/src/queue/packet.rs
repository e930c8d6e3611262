//! Parses one packet from the transmit ring into pieces, by the rules of Linux's netback.

use super::ring::Ring;
use crate::fault::{DropReason, Fault, SLOTS_FATAL, SLOTS_MAX};
use crate::port::Gso;
use crate::wire::SEGMENT_MIN;
use alloc::vec::Vec;
use pvio_grant_table::GrantRef;
use pvio_ring::Slot;
use pvio_ring::proto::checksum::ETHERNET_HEADER;
use pvio_ring::proto::netif::{Extra, ExtraKind, TxFlags, TxRequest};
use pvio_ring::shm::{PAGE_SIZE, SharedMemory};

/// Data slot that was read and checked: `size` bytes at `offset` lie in one page.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub gref: GrantRef,
    pub id: u16,
    pub offset: u16,
    /// Size of this slot's data in bytes. For the first slot too, whose request holds the packet's
    /// size.
    pub size: u16,
    /// Set later if its page could not be copied.
    pub failed: bool,
}

/// Change of the guest's multicast groups.
#[derive(Clone, Copy, Debug)]
pub(super) enum GroupChange {
    Add([u8; 6]),
    Remove([u8; 6]),
}

/// Packet or request taken from the ring. Its data slots are at the end of the list of pieces.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    /// Size of the whole packet in bytes.
    pub len: usize,
    pub flags: TxFlags,
    /// Number of extra segments; each takes a slot that needs a response.
    pub extras: u32,
    pub gso: Option<Gso>,
    /// The request carries no packet, but this change.
    pub group: Option<GroupChange>,
    /// Reason to drop the packet, if there is one.
    pub refused: Option<DropReason>,
}

/// Takes one packet, reads every slot once, and records it as taken. Called only if a request is
/// outstanding.
///
/// # Errors
/// A [`Fault`], which ends the vif.
pub(super) fn take<M: SharedMemory, R: SharedMemory>(
    ring: &mut Ring<M, R>,
    pieces: &mut Vec<Piece>,
) -> Result<Taken, Fault> {
    let taken = take_slots(ring, pieces)?;
    ring.record_taken();
    Ok(taken)
}

fn take_slots<M: SharedMemory, R: SharedMemory>(
    ring: &mut Ring<M, R>,
    pieces: &mut Vec<Piece>,
) -> Result<Taken, Fault> {
    let first = next(ring, Fault::MissingSlots { have: 0 }, TxRequest::read)?;
    let extras = take_extras(ring, first.flags)?;
    let mut taken = Taken {
        len: usize::from(first.size),
        flags: first.flags,
        extras: extras.count,
        gso: extras.gso,
        group: extras.group,
        refused: extras.gso.filter(|gso| gso.size < SEGMENT_MIN).map(|_| DropReason::TxGsoSmall),
    };
    let start = pieces.len();
    pieces.push(Piece::of(&first));
    if extras.group.is_some() {
        // Such a slot carries no packet, whatever its other fields hold.
        return Ok(taken);
    }

    let mut left = first.size;
    let mut have = 1_usize;
    let mut more = first.flags.contains(TxFlags::MORE_DATA);
    while more {
        // The order of these checks is Linux's and is visible to frontends: a missing slot ends the
        // vif even if the packet would be dropped.
        if ring.waiting() == 0 {
            return Err(Fault::MissingSlots { have });
        }
        if have >= SLOTS_FATAL {
            return Err(Fault::TooManySlots);
        }
        if have >= SLOTS_MAX {
            taken.refused.get_or_insert(DropReason::TxSlots);
        }
        let slot = next(ring, Fault::MissingSlots { have }, TxRequest::read)?;
        if slot.size > left {
            taken.refused.get_or_insert(DropReason::TxSlotBeyondPacket);
        }
        left = left.saturating_sub(slot.size);
        check_page(slot.offset, slot.size)?;
        pieces.push(Piece::of(&slot));
        have = have.saturating_add(1);
        more = slot.flags.contains(TxFlags::MORE_DATA);
    }
    if taken.refused.is_some() {
        return Ok(taken);
    }
    if taken.len < ETHERNET_HEADER {
        taken.refused = Some(DropReason::TxShort);
        return Ok(taken);
    }
    // The first slot's data is the packet's size minus the other slots' data.
    check_page(first.offset, left)?;
    if let Some(piece) = pieces.get_mut(start) {
        piece.size = left;
    }
    Ok(taken)
}

#[derive(Default)]
struct Extras {
    count: u32,
    gso: Option<Gso>,
    group: Option<GroupChange>,
}

fn take_extras<M: SharedMemory, R: SharedMemory>(
    ring: &mut Ring<M, R>,
    flags: TxFlags,
) -> Result<Extras, Fault> {
    let mut extras = Extras::default();
    let mut more = flags.contains(TxFlags::EXTRA_INFO);
    while more {
        let extra = next(ring, Fault::MissingExtra, Extra::read)??;
        // Bounded by the number of slots in the ring.
        extras.count = extras.count.saturating_add(1);
        more = extra.more;
        match extra.kind {
            ExtraKind::Gso { size, kind } => extras.gso = Some(Gso { size, kind }),
            // One change per request; further ones are ignored, as in Linux.
            ExtraKind::McastAdd(group) => {
                extras.group.get_or_insert(GroupChange::Add(group));
            }
            ExtraKind::McastDel(group) => {
                extras.group.get_or_insert(GroupChange::Remove(group));
            }
            // The guest's hash of the packet and the position of its data: the port uses neither.
            ExtraKind::Hash { .. } | ExtraKind::Xdp { .. } => {}
        }
    }
    Ok(extras)
}

/// Reads the next slot, as of the last check of the producer index. Returns `missing` if there is
/// none.
fn next<M: SharedMemory, R: SharedMemory, T, E>(
    ring: &mut Ring<M, R>,
    missing: Fault,
    read: impl FnOnce(&mut Slot<'_, R>) -> Result<T, E>,
) -> Result<T, Fault> {
    if ring.waiting() == 0 {
        return Err(missing);
    }
    let mut slot = ring.take().map_err(Fault::TxRing)?.ok_or(missing)?;
    // A slot has the ring's slot size, so reading it does not fail.
    read(&mut slot).map_err(|_| missing)
}

fn check_page(offset: u16, size: u16) -> Result<(), Fault> {
    let end = usize::from(offset).saturating_add(usize::from(size));
    if end > PAGE_SIZE { Err(Fault::CrossesPage { offset, size }) } else { Ok(()) }
}

impl Piece {
    fn of(slot: &TxRequest) -> Self {
        Self { gref: slot.gref, id: slot.id, offset: slot.offset, size: slot.size, failed: false }
    }
}
