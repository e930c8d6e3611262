//! Serving vbds from images, a thread per queue: what a driver domain does.

use crate::engine::Geometry;
use crate::image::{Format, Image, ImageOptions, Spec};
use crate::queue::{QueueFault, QueueParts};
use crate::vbd::{Platform, Serve};
use crate::worker::Worker;
use alloc::format;
use alloc::sync::Arc;
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::vbd::{Mode, ToolstackBack};
use std::os::fd::AsFd;

/// Serves a vbd from whatever its `params` name.
pub struct ImageServer {
    image: Option<Arc<Image>>,
    /// It is a raw file or a block device, which anybody may make larger.
    grows: bool,
    wake: Arc<dyn Fn() + Send + Sync>,
}

impl ImageServer {
    /// `wake` is called by a worker that ended by itself: step the driver then.
    pub fn new(wake: Arc<dyn Fn() + Send + Sync>) -> Self {
        Self { image: None, grows: false, wake }
    }
}

/// What a disk is kept in.
fn place(disk: &ToolstackBack) -> Result<Spec, Fault> {
    let (format, rest) = disk.backing();
    let spec = Spec::with_format(format, rest).map_err(|e| Fault::new("image-name", e))?;
    Ok(match (&disk.physical_device_path, spec) {
        // A script puts a loop device before a file, which would only cost.
        (Some(device), Spec::File { format: Format::Raw, path, .. }) if !path.is_file() => {
            Spec::file(Format::Raw, device)
        }
        (_, spec) => spec,
    })
}

impl<P> Serve<P> for ImageServer
where
    P: Platform + Send + 'static,
    P::Channel: AsFd,
{
    type Running = Worker;

    fn open(&mut self, disk: &ToolstackBack) -> Result<Geometry, Fault> {
        // Lets go of its locks.
        self.image = None;
        let spec = if disk.is_empty_drive() { Spec::Ram { bytes: 0 } } else { place(disk)? };
        let options =
            ImageOptions { read_only: disk.mode == Mode::ReadOnly, direct: disk.direct_io_safe };
        let image = Image::open_disk(&spec, options).map_err(|e| Fault::new(e.code(), e))?;
        let geometry = image.geometry();
        self.grows = matches!(spec, Spec::File { format: Format::Raw, .. });
        self.image = Some(Arc::new(image));
        Ok(geometry)
    }

    fn sectors(&mut self) -> Option<u64> {
        let image = self.image.as_ref().filter(|_| self.grows)?;
        match image.file_bytes() {
            // Whole logical sectors: a file that is being appended to may have any length.
            Some(Ok(bytes)) => {
                let unit = u64::from(image.geometry().sector_size);
                Some(bytes / unit * (unit / 512))
            }
            Some(Err(error)) => {
                tracing::warn!(%error, "how large the image is cannot be found out");
                None
            }
            None => None,
        }
    }

    fn start(
        &mut self,
        name: &str,
        parts: QueueParts<P, P::Channel>,
    ) -> Result<Self::Running, Fault> {
        let image =
            self.image.clone().ok_or_else(|| Fault::new("image-missing", "no image is open"))?;
        let wake = Arc::clone(&self.wake);
        Worker::start(name, parts, image, move || wake())
            .map_err(|e| Fault::new("worker", format!("the queue's worker cannot start: {e}")))
    }

    fn fault(&mut self, running: &mut Worker) -> Option<QueueFault> {
        running.fault()
    }
}
