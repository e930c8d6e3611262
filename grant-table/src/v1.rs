//! Version 1 of the grant table: 8-byte entries `{flags: u16, domid: u16, frame: u32}`
//! (`grant_entry_v1_t`), in pages shared between the granting domain and the hypervisor.
//!
//! The first four bytes of an entry are accessed as one word, so that flags and domain are always
//! consistent. The rules, from `grant_table.h`:
//!
//! - **Grant**: write `frame`, then (`Release`) flags with `GTF_permit_access` and the domain.
//! - **Use** (the hypervisor's side): check type and domain, then set `GTF_reading` or
//!   `GTF_writing` by compare-and-exchange; clear them when the last use ends.
//! - **End access**: by compare-and-exchange set flags to 0, *only while neither in-use flag is
//!   set*; otherwise the page is still in use, and must not be reused.

use crate::{Access, Busy, DomId, GrantError, GrantRef, GrantStatus};
use bitflags::bitflags;
use core::sync::atomic::Ordering;
use pvio_ring::shm::{Region, SharedMemory};

/// Size of an entry, in bytes.
pub const ENTRY_SIZE: usize = 8;

bitflags! {
    /// Flags of an entry (`GTF_*`).
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Flags: u16 {
        /// The entry grants access to a page (type 1 of `GTF_type_mask`).
        const PERMIT_ACCESS = 1;
        /// The type bits.
        const TYPE = 3;
        /// Read access only.
        const READONLY = 4;
        /// The other domain currently has read access; set by the hypervisor.
        const READING = 8;
        /// The other domain currently has write access; set by the hypervisor.
        const WRITING = 16;
    }
}

const IN_USE: Flags = Flags::READING.union(Flags::WRITING);

/// A grant table of version 1.
#[derive(Clone, Debug)]
pub struct GrantTable<M> {
    mem: M,
}

impl<M: SharedMemory> GrantTable<M> {
    /// Uses the table in `mem`.
    #[must_use]
    pub const fn new(mem: M) -> Self {
        Self { mem }
    }

    /// Returns the number of entries.
    #[must_use]
    pub fn entries(&self) -> u32 {
        u32::try_from(self.mem.len().wrapping_div(ENTRY_SIZE)).unwrap_or(u32::MAX)
    }

    /// Fills a free entry (the granting domain's side).
    ///
    /// # Errors
    /// [`GrantError::OutOfEntries`] if there is no such entry, [`GrantError::Refused`] if it is not
    /// free.
    pub fn grant(
        &self,
        gref: GrantRef,
        peer: DomId,
        frame: u32,
        access: Access,
    ) -> Result<(), GrantError> {
        let at = self.place(gref).ok_or(GrantError::OutOfEntries)?;
        if self.word(at).is_none_or(|w| w != 0) {
            return Err(GrantError::Refused(GrantStatus::BadGrantRef));
        }
        let flags = match access {
            Access::ReadOnly => Flags::PERMIT_ACCESS | Flags::READONLY,
            Access::ReadWrite => Flags::PERMIT_ACCESS,
        };
        self.mem.store_u32(at.wrapping_add(4), frame, Ordering::Relaxed);
        self.mem.store_u32(at, join(flags, peer), Ordering::Release);
        Ok(())
    }

    /// Revokes an entry (the granting domain's side). Has no effect on an entry that is not
    /// granted.
    ///
    /// # Errors
    /// [`Busy`] while the other domain uses the page.
    pub fn end_access(&self, gref: GrantRef) -> Result<(), Busy> {
        let Some(at) = self.place(gref) else { return Ok(()) };
        let mut word = self.word(at).unwrap_or_default();
        loop {
            if split(word).0.intersects(IN_USE) && !pvio_ring::planted!(GrantInUse) {
                return Err(Busy(gref));
            }
            match self.mem.compare_exchange_u32(at, word, 0) {
                Some(Err(now)) => word = now,
                Some(Ok(_)) | None => return Ok(()),
            }
        }
    }

    /// Marks an entry in use by `user` and returns the frame that it grants access to (the
    /// hypervisor's side). An entry may be marked several times; the caller counts the uses.
    ///
    /// # Errors
    /// [`GrantStatus::BadGrantRef`] if there is no such entry or it is not a grant to `user`,
    /// [`GrantStatus::PermissionDenied`] if it is read-only and write access is requested.
    pub fn pin(&self, gref: GrantRef, user: DomId, access: Access) -> Result<u32, GrantStatus> {
        let at = self.place(gref).ok_or(GrantStatus::BadGrantRef)?;
        let mut word = self.word(at).ok_or(GrantStatus::BadGrantRef)?;
        // The granting domain may change the entry concurrently: each change costs one retry.
        for _ in 0..16 {
            let (flags, domain) = split(word);
            if flags & Flags::TYPE != Flags::PERMIT_ACCESS || domain != user {
                return Err(GrantStatus::BadGrantRef);
            }
            if flags.contains(Flags::READONLY) && access == Access::ReadWrite {
                return Err(GrantStatus::PermissionDenied);
            }
            let used = flags | in_use(access);
            match self.mem.compare_exchange_u32(at, word, join(used, domain)) {
                Some(Ok(_)) => {
                    // Stable from here on: the granting domain may not change an entry in use.
                    let frame = self.mem.load_u32(at.wrapping_add(4), Ordering::Acquire);
                    return frame.ok_or(GrantStatus::BadGrantRef);
                }
                Some(Err(now)) => word = now,
                None => return Err(GrantStatus::BadGrantRef),
            }
        }
        Err(GrantStatus::Again)
    }

    /// Marks an entry as no longer in use for `access` (the hypervisor's side). Write access
    /// includes read access, so ending it clears both flags.
    pub fn unpin(&self, gref: GrantRef, access: Access) {
        let Some(at) = self.place(gref) else { return };
        let gone = in_use(access);
        // On little-endian machines, the only ones that the ABI supports, the flags are the low
        // half of the word; clearing bits of the whole word preserves the domain.
        let mut word = self.word(at).unwrap_or_default();
        while let Some(Err(now)) = {
            let (flags, domain) = split(word);
            self.mem.compare_exchange_u32(at, word, join(flags.difference(gone), domain))
        } {
            word = now;
        }
    }

    /// Clears the in-use flags of every entry granted to a domain that no longer exists.
    pub fn forget_user(&self, user: DomId) {
        for gref in (0..self.entries()).map(GrantRef) {
            let Some(at) = self.place(gref) else { break };
            let (flags, domain) = split(self.word(at).unwrap_or_default());
            if domain == user && flags.intersects(IN_USE) {
                self.unpin(gref, Access::ReadWrite);
            }
        }
    }

    /// Returns the current contents of the entry.
    #[must_use]
    pub fn entry(&self, gref: GrantRef) -> Option<(Flags, DomId)> {
        self.word(self.place(gref)?).map(split)
    }

    #[inline]
    fn place(&self, gref: GrantRef) -> Option<usize> {
        let at = usize::try_from(gref.0).ok()?.checked_mul(ENTRY_SIZE)?;
        (gref.0 < self.entries()).then_some(at)
    }

    #[inline]
    fn word(&self, at: usize) -> Option<u32> {
        self.mem.load_u32(at, Ordering::Acquire)
    }
}

const fn in_use(access: Access) -> Flags {
    match access {
        Access::ReadOnly => Flags::READING,
        Access::ReadWrite => IN_USE,
    }
}

const fn split(word: u32) -> (Flags, DomId) {
    let [f0, f1, d0, d1] = word.to_le_bytes();
    (Flags::from_bits_retain(u16::from_le_bytes([f0, f1])), DomId(u16::from_le_bytes([d0, d1])))
}

const fn join(flags: Flags, domain: DomId) -> u32 {
    let [f0, f1] = flags.bits().to_le_bytes();
    let [d0, d1] = domain.0.to_le_bytes();
    u32::from_le_bytes([f0, f1, d0, d1])
}

#[cfg(test)]
mod tests {
    use super::*;
    use pvio_ring::shm::HeapMemory;

    const GREF: GrantRef = GrantRef(9);
    const BACK: DomId = DomId(1);

    fn table() -> GrantTable<HeapMemory> {
        let table = GrantTable::new(HeapMemory::pages(1));
        table.grant(GREF, BACK, 77, Access::ReadWrite).unwrap();
        table
    }

    #[test]
    fn grant_table_page_holds_512_entries() {
        assert_eq!(GrantTable::new(HeapMemory::pages(1)).entries(), 512);
    }

    #[test]
    fn end_access_is_busy_only_while_pinned() {
        let table = table();
        assert_eq!(table.pin(GREF, BACK, Access::ReadOnly), Ok(77));
        assert_eq!(table.end_access(GREF), Err(Busy(GREF)));
        table.unpin(GREF, Access::ReadOnly);
        assert_eq!(table.end_access(GREF), Ok(()));
        assert_eq!(table.pin(GREF, BACK, Access::ReadOnly), Err(GrantStatus::BadGrantRef));
    }

    #[test]
    fn pin_by_other_domain_or_beyond_access_is_rejected() {
        let table = table();
        assert_eq!(table.pin(GREF, DomId(3), Access::ReadOnly), Err(GrantStatus::BadGrantRef));
        assert_eq!(table.pin(GrantRef(10), BACK, Access::ReadOnly), Err(GrantStatus::BadGrantRef));
        assert_eq!(table.pin(GrantRef(512), BACK, Access::ReadOnly), Err(GrantStatus::BadGrantRef));
        assert_eq!(
            table.pin(GrantRef(u32::MAX), BACK, Access::ReadOnly),
            Err(GrantStatus::BadGrantRef)
        );
        table.grant(GrantRef(11), BACK, 5, Access::ReadOnly).unwrap();
        assert_eq!(
            table.pin(GrantRef(11), BACK, Access::ReadWrite),
            Err(GrantStatus::PermissionDenied)
        );
        assert_eq!(table.pin(GrantRef(11), BACK, Access::ReadOnly), Ok(5));
    }

    #[test]
    fn grant_of_entry_in_use_fails() {
        let table = table();
        assert!(table.grant(GREF, DomId(4), 78, Access::ReadWrite).is_err());
    }

    #[test]
    fn forget_user_unpins_entries_of_domain() {
        let table = table();
        table.pin(GREF, BACK, Access::ReadWrite).unwrap();
        table.forget_user(DomId(3));
        assert!(table.end_access(GREF).is_err());
        table.forget_user(BACK);
        assert_eq!(table.end_access(GREF), Ok(()));
    }
}
