//! What a guest has set up over its rings (hash, steering, groups), kept in xenstore: a process that takes
//! its session over finds it there.

use super::{Serve, Vif};
use crate::Platform;
use crate::queue::{Notes, Queue};
use alloc::sync::Arc;
use alloc::vec::Vec;
use pvio_xenbus::Xenstore;
use pvio_xenbus::driver::{Ends, Fault};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::vif::{
    read_kept_groups, read_kept_hash, write_kept_groups, write_kept_hash,
};

impl<P: Platform + Clone, S: Serve<P>> Vif<P, S> {
    /// Takes up what the guest of a session that is taken over had set up over its rings, and notes what
    /// it sets up from now on.
    pub(super) fn keep_notes(
        &mut self,
        xs: &mut dyn Xenstore,
        ends: &Ends,
        queues: &mut [Queue<P, S::Buf>],
    ) -> Result<(), Fault> {
        (self.kept_groups, self.hears_all) = (Vec::new(), false);
        if ends.resumed {
            self.kept_groups = read_kept_groups(xs, &ends.back)?;
            for group in &self.kept_groups {
                // There is place: it is no more than there was.
                self.groups.add(*group);
            }
            // A guest that has chosen and named none, or whose choice is lost with its backend's directory,
            // hears all rather than nothing.
            self.hears_all = self.kept_groups.is_empty();
            if let Some(kept) = read_kept_hash(xs, &ends.back)?
                && let Some(first) = queues.first_mut()
                && !first.restore_hash(&kept)
            {
                let text = "the hash that was kept of this guest is none that it can have set up";
                return Err(Fault::new("kept-hash", text));
            }
        } else {
            // Of another session, perhaps.
            write_kept_groups(xs, &ends.back, &[])?;
            write_kept_hash(xs, &ends.back, None)?;
        }
        let notes = Arc::new(Notes::new(self.server.waker()));
        queues.iter_mut().for_each(|queue| queue.keep_notes(&notes));
        self.notes = Some(notes);
        Ok(())
    }

    /// Keeps what has changed of that.
    pub(super) fn write_notes(
        &mut self,
        xs: &mut dyn Xenstore,
        ends: &Ends,
    ) -> Result<(), HandshakeError> {
        let Some(notes) = &self.notes else { return Ok(()) };
        if let Some(hash) = notes.take_hash() {
            write_kept_hash(xs, &ends.back, hash.as_ref())?;
        }
        let mut groups = self.groups.named();
        groups.sort_unstable();
        groups.dedup();
        if groups != self.kept_groups {
            write_kept_groups(xs, &ends.back, &groups)?;
            self.kept_groups = groups;
        }
        Ok(())
    }
}
