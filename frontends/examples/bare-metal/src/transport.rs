//! The crates of layers 1 and 2, which need no allocator.

use pvio_event_channel::{Port, two_level::EventPage};
use pvio_grant_table::{Access, DomId, GrantRef, v1::GrantTable};
use pvio_ring::{BackRing, FrontRing};
use pvio_xenbus::wire::{self, Header, Op};

use crate::pages::TheBss;

/// Sends a request and its response through a ring.
pub fn ring() -> bool {
    let Some(page) = TheBss::take() else { return false };
    let Ok(mut front) = FrontRing::init(page.end(), 16) else { return false };
    let Ok(mut back) = BackRing::attach(page.end(), 16) else { return false };
    if front.push(&[7; 16]).is_err() || !front.publish() {
        return false;
    }
    let mut request = [0; 16];
    let Ok(Some(mut slot)) = back.pop() else { return false };
    if slot.read(&mut request).is_err() {
        return false;
    }
    if request != [7; 16] || back.push(&[9; 16]).is_err() || !back.publish() {
        return false;
    }
    let mut response = [0; 16];
    let Ok(Some(mut slot)) = front.pop() else { return false };
    slot.read(&mut response).is_ok() && response == [9; 16]
}

/// Grants access, uses the grant, and revokes it.
pub fn grant_table() -> bool {
    let Some(page) = TheBss::take() else { return false };
    let table = GrantTable::new(page.end());
    table.grant(GrantRef(8), DomId(1), 0x42, Access::ReadWrite).is_ok()
        && table.pin(GrantRef(8), DomId(1), Access::ReadWrite) == Ok(0x42)
        && table.end_access(GrantRef(8)).is_err()
        && {
            table.unpin(GrantRef(8), Access::ReadWrite);
            table.end_access(GrantRef(8)).is_ok()
        }
}

/// Sends an event and receives it.
pub fn event_channel() -> bool {
    let Some(page) = TheBss::take() else { return false };
    let events = EventPage::new(page.end());
    events.raise(Port(7)) && events.take(Port(7)) && !events.take(Port(7))
}

/// Formats a xenstore message and parses it.
pub fn xenstore() -> bool {
    let Ok(header) = Header::new(Op::Read, 3, 0, 6) else { return false };
    let mut message = [0; 22];
    message[..16].copy_from_slice(&header.emit());
    message[16..].copy_from_slice(b"/local");
    matches!(wire::decode(&message), Ok(Some(frame)) if frame.payload == b"/local")
}
