//! Media changes of a drive that is being served.

use super::{Opening, Vbd, VbdServer};
use crate::engine::Geometry;
use crate::session::Begin;
use alloc::format;
use alloc::vec::Vec;
use pvio_xenbus::Xenstore;
use pvio_xenbus::driver::{BackendClass, BackendContext, Fault};
use pvio_xenbus::handshake::vbd::{ToolstackBack, announce_resize};

/// A media change in progress.
#[derive(Debug)]
pub(super) struct Change {
    keys: ToolstackBack,
    /// The geometry of the drive before the change.
    before: Option<Geometry>,
    /// The reason for which the new media was rejected; the drive becomes empty.
    refused: Option<Fault>,
}

impl<S: VbdServer> Vbd<S> {
    /// Begins a change of the drive's media after the toolstack inserted other media or ejected it.
    /// The frontend sees an empty drive, then the new media, as changes of the disk's size: the
    /// protocol has no other notification. The rings stay connected, and requests that arrive
    /// during the change wait in them.
    pub(super) fn change_media(
        &mut self,
        xs: &mut dyn Xenstore,
        context: &BackendContext,
        mut keys: ToolstackBack,
    ) -> Result<(), Fault> {
        let before = self.disk.clone();
        if let Some((before, _)) = &before
            && before.physical_device_path == keys.physical_device_path
        {
            // The toolstack's script created this path for the previous media.
            keys.physical_device_path = None;
        }
        announce_resize(xs, &context.back, 0)?;
        let before = before.map(|(_, geometry)| geometry);
        self.change = Some(Change { keys, before, refused: None });
        self.continue_change(xs, context)
    }

    /// Continues a media change, if one is in progress.
    pub(super) fn continue_change(
        &mut self,
        xs: &mut dyn Xenstore,
        context: &BackendContext,
    ) -> Result<(), Fault> {
        if self.change.is_none() {
            return Ok(());
        }
        // Every taken request is completed before the media is removed: none is left for the next one.
        if let Some(session) = &mut self.session {
            self.server.abandon(session);
        }
        if self.stop().is_pending() {
            return Ok(());
        }
        let Some(change) = self.change.take() else { return Ok(()) };
        let changed = self.finish_change(xs, context, change);
        if self.change.is_some() {
            return Ok(());
        }
        if let Err(fault) = &changed
            && self.session.is_none()
            && self.spec.is_some()
        {
            self.failed = Some(fault.clone());
        }
        // The toolstack may have changed the media again in the meantime.
        changed.and(self.refresh(xs, context))
    }

    fn finish_change(
        &mut self,
        xs: &mut dyn Xenstore,
        context: &BackendContext,
        mut change: Change,
    ) -> Result<(), Fault> {
        let keys = &change.keys;
        let empty = ToolstackBack { params: Vec::new(), ..keys.clone() };
        if change.refused.is_none() {
            match self.poll_open(keys) {
                Ok(Opening::Done(now)) => change.refused = self.sector_size_fault(&change, &now),
                Ok(Opening::Pending | Opening::Busy(_)) => {
                    self.change = Some(change);
                    return Ok(());
                }
                Err(fault) => change.refused = Some(fault),
            }
        }
        if change.refused.is_some() {
            if !matches!(self.poll_open(&empty)?, Opening::Done(_)) {
                self.change = Some(change);
                return Ok(());
            }
            if let Some((disk, _)) = &mut self.disk {
                // The change is not retried until the toolstack configures something else.
                *disk = change.keys;
            }
        }
        if self.spec.is_some() {
            self.start(context, Begin::Again)?;
            if let Err(fault) = self.poll_ready() {
                self.failed = Some(fault.clone());
                return Err(fault);
            }
            if let Some(geometry) = self.geometry() {
                announce_resize(xs, &context.back, geometry.sectors)?;
            }
        }
        change.refused.map_or(Ok(()), Err)
    }

    /// Returns why a connected frontend cannot use the new media: its logical sector size differs.
    fn sector_size_fault(&self, change: &Change, now: &Geometry) -> Option<Fault> {
        let before = change.before.filter(|_| now.sectors > 0 && self.spec.is_some())?;
        if now.sector_size == before.sector_size {
            return None;
        }
        let text = format!(
            "the new media cannot be used: it has sectors of {} bytes, and the connected frontend uses {}",
            now.sector_size, before.sector_size
        );
        Some(Fault::new("medium-sectors", text))
    }
}
