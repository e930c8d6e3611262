//! Grants of a custom hypervisor: a domain has a grant table and frames.
//!
//! ```console
//! $ cargo run -p pvio-grant-table --example own_platform
//! ```

use pvio_grant_table::{Access, DomId, GrantRef, GrantStatus, v1::GrantTable};
use pvio_ring::shm::{Guarded, HeapMemory, Region};
use std::sync::Arc;

struct Domain {
    table: GrantTable<HeapMemory>,
    frames: Vec<HeapMemory>,
}

/// Marks a grant as in use. Dropping it ends the use.
struct Use(Arc<Domain>, GrantRef);

impl Drop for Use {
    fn drop(&mut self) {
        self.0.table.unpin(self.1, Access::ReadWrite);
    }
}

type Mapping = Guarded<HeapMemory, Use>;

/// Maps a page that `owner` granted to `user`: the hypervisor's part of `GNTTABOP_map_grant_ref`.
fn map(owner: &Arc<Domain>, user: DomId, gref: GrantRef) -> Result<Mapping, GrantStatus> {
    let frame = owner.table.pin(gref, user, Access::ReadWrite)?;
    let in_use = Use(Arc::clone(owner), gref);
    // The owner wrote the frame number: it may name a frame that does not exist.
    let page = owner.frames.get(frame as usize).ok_or(GrantStatus::BadPage)?;
    Ok(Guarded::new(page.clone(), in_use))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (driver, gref) = (DomId(1), GrantRef(8));
    let frames = (0..4).map(|_| HeapMemory::pages(1)).collect();
    let guest = Arc::new(Domain { table: GrantTable::new(HeapMemory::pages(1)), frames });

    guest.table.grant(gref, driver, 2, Access::ReadWrite)?;
    assert!(map(&guest, DomId(3), gref).is_err(), "another domain must not map it");
    let page = map(&guest, driver, gref)?;
    page.write_bytes(0, b"hello").ok_or("beyond the page")?;
    let mut greeting = [0; 5];
    guest.frames[2].read_bytes(0, &mut greeting).ok_or("beyond the page")?;
    assert_eq!(&greeting, b"hello");

    assert!(guest.table.end_access(gref).is_err(), "still mapped");
    drop(page);
    guest.table.end_access(gref)?;
    assert_eq!(map(&guest, driver, gref).err(), Some(GrantStatus::BadGrantRef));
    Ok(())
}
