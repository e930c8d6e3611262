//! Grants and events of a custom hypervisor: a domain has a grant table, an event page and frames.
//!
//! ```console
//! $ cargo run -p pvio-grant-table --example own_platform
//! ```

use pvio_event_channel::{Port, two_level::EventPage};
use pvio_grant_table::{Access, DomId, GrantRef, GrantStatus, v1::GrantTable};
use pvio_ring::shm::{Guarded, HeapMemory, Region};
use std::error::Error;
use std::sync::Arc;

struct Domain {
    table: GrantTable<HeapMemory>,
    events: EventPage<HeapMemory>,
    frames: Vec<HeapMemory>,
}

/// Marks a grant as in use. Dropping it ends the use.
struct Use(Arc<Domain>, GrantRef, Access);

impl Drop for Use {
    fn drop(&mut self) {
        self.0.table.unpin(self.1, self.2);
    }
}

/// Maps a page that `owner` granted to `user`: the hypervisor's part of `GNTTABOP_map_grant_ref`.
fn map(
    owner: &Arc<Domain>,
    user: DomId,
    gref: GrantRef,
) -> Result<Guarded<HeapMemory, Use>, GrantStatus> {
    let frame = owner.table.pin(gref, user, Access::ReadWrite)?;
    let in_use = Use(Arc::clone(owner), gref, Access::ReadWrite);
    // The owner wrote the frame number: it may name a frame that does not exist.
    let page = owner.frames.get(frame as usize).ok_or(GrantStatus::BadPage)?;
    Ok(Guarded::new(page.clone(), in_use))
}

fn main() -> Result<(), Box<dyn Error>> {
    const DRIVER: DomId = DomId(1);
    const BELL: Port = Port(7);
    let guest = Arc::new(Domain {
        table: GrantTable::new(HeapMemory::pages(1)),
        events: EventPage::new(HeapMemory::pages(1)),
        frames: (0..4).map(|_| HeapMemory::pages(1)).collect(),
    });

    let gref = GrantRef(8);
    guest.table.grant(gref, DRIVER, 2, Access::ReadWrite)?;
    assert!(map(&guest, DomId(3), gref).is_err(), "another domain must not map it");

    let page = map(&guest, DRIVER, gref)?;
    page.write_bytes(0, b"hello").ok_or("beyond the page")?;
    assert!(guest.events.raise(BELL), "no event was pending: the hypervisor wakes the guest");

    assert!(guest.events.take(BELL));
    let mut greeting = [0; 5];
    guest.frames[2].read_bytes(0, &mut greeting).ok_or("beyond the page")?;
    assert_eq!(&greeting, b"hello");

    assert!(guest.table.end_access(gref).is_err(), "still mapped");
    drop(page);
    guest.table.end_access(gref)?;
    assert_eq!(map(&guest, DRIVER, gref).err(), Some(GrantStatus::BadGrantRef));
    Ok(())
}
