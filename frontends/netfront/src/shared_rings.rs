//! All that a NIC shares with one backend.

use crate::control::Control;
use crate::queue::Queue;
use alloc::vec::Vec;
use pvio_event_channel::EventChannels;
use pvio_grant_table::Granter;

/// The queues of a NIC and its control ring.
pub struct SharedRings<P: Granter + EventChannels> {
    pub queues: Vec<Queue<P>>,
    pub control: Option<Control<P>>,
}

impl<P: Granter + EventChannels> SharedRings<P> {
    /// Revokes all grants and frees the memory. Returns what the backend has still mapped.
    #[expect(clippy::result_large_err, reason = "the rings themselves, at their end")]
    pub fn dismantle(mut self) -> Result<(), Self> {
        self.queues = self.queues.into_iter().filter_map(|queue| queue.dismantle().err()).collect();
        if self.control.as_mut().is_some_and(Control::revoke) {
            self.control = None;
        }
        if self.queues.is_empty() && self.control.is_none() { Ok(()) } else { Err(self) }
    }
}
