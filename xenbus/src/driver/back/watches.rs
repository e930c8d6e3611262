//! The watches of a backend.

use super::BackendDriver;
use crate::driver::BackendClass;
use crate::driver::watch;
use crate::handshake::common::{hotplug_path, online_path, state_path};
use crate::xenstore::{Xenstore, XsError};

impl<C: BackendClass> BackendDriver<C> {
    /// Registers the watches that the class requests while the device is connected, and removes
    /// them afterwards.
    pub(super) fn watch_more(
        &mut self,
        xs: &mut dyn Xenstore,
        served: bool,
    ) -> Result<(), XsError> {
        if self.watching_more == served {
            return Ok(());
        }
        for path in self.class.watches(&self.context) {
            if served {
                watch(xs, &path, &self.context.back)?;
            } else {
                // Fails if the permission to watch was removed with the node.
                let _ = xs.unwatch(&path, &self.context.back);
            }
        }
        self.watching_more = served;
        Ok(())
    }

    pub(super) fn unwatch(&mut self, xs: &mut dyn Xenstore) {
        let _ = self.watch_more(xs, false);
        // Fails if the nodes' permissions are gone; a watch that is left is harmless.
        let _ = xs.unwatch(&state_path(&self.context.front), &self.context.back);
        let _ = xs.unwatch(&online_path(&self.context.back), &self.context.back);
        if self.awaiting {
            let _ = xs.unwatch(&hotplug_path(&self.context.back), &self.context.back);
        }
    }
}
