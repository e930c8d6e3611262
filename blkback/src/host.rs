//! Serving vbds from images, a thread per queue: what a driver domain does.

use crate::engine::Geometry;
use crate::image::{Image, ImageError, ImageOptions};
use crate::queue::{QueueFault, QueueParts};
use crate::vbd::{Platform, Serve};
use crate::worker::Worker;
use alloc::format;
use alloc::sync::Arc;
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::vbd::{Mode, ToolstackBack};
use std::os::fd::AsFd;
use std::path::Path;

/// Serves a vbd from the raw image or block device its `params` names.
pub struct ImageServer {
    image: Option<Arc<Image>>,
    wake: Arc<dyn Fn() + Send + Sync>,
}

impl ImageServer {
    /// `wake` is called by a worker that ended by itself: step the driver then.
    pub fn new(wake: Arc<dyn Fn() + Send + Sync>) -> Self {
        Self { image: None, wake }
    }
}

/// Where a disk's image is.
fn place(disk: &ToolstackBack) -> Result<&Path, Fault> {
    let (format, path) = disk.backing();
    if format != "raw" {
        let what = format!(
            "{path} is given as a {format} image, and only raw ones are served; \
             qemu-img convert -O raw makes one of it"
        );
        return Err(Fault::new("image-format", what));
    }
    let path = Path::new(path);
    Ok(match &disk.physical_device_path {
        // A script puts a loop device before a file, which would only cost.
        Some(device) if !path.is_file() => Path::new(device),
        _ => path,
    })
}

impl<P> Serve<P> for ImageServer
where
    P: Platform + Send + 'static,
    P::Channel: AsFd,
{
    type Running = Worker;

    fn open(&mut self, disk: &ToolstackBack) -> Result<Geometry, Fault> {
        let path = place(disk)?;
        let options =
            ImageOptions { read_only: disk.mode == Mode::ReadOnly, direct: disk.direct_io_safe };
        let image = Image::open(path, options).map_err(|e: ImageError| Fault::new(e.code(), e))?;
        let geometry = image.geometry();
        self.image = Some(Arc::new(image));
        Ok(geometry)
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
