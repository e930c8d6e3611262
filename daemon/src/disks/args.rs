//! Arguments of the disk commands.

use super::vdev::Vdev;
use crate::failure::Failure;
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, ValueEnum};
use pvio_ring::error::Remedy;
use pvio_storage::image::{Disk, DiskError, DiskOptions, EscapedPath, OptionError};
use pvio_xenbus::handshake::common::BackendKind;
use std::borrow::Cow;
use std::error::Error;
use std::os::unix::ffi::OsStrExt;
use std::path::{PathBuf, absolute};

/// Which xenstore to use.
#[derive(Debug, Clone, Args)]
pub struct StoreArgs {
    /// State directory of a running `pvio run`; Xen's own xenstore if left out
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// The kind of backend that serves a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// pvio alone
    PvioVbd,
    /// pvio where Linux's xen-blkback is not loaded; xl lists and removes it too
    Vbd,
}

impl Kind {
    /// Returns the kind's name in xenstore paths.
    #[must_use]
    pub const fn backend(self) -> BackendKind {
        match self {
            Self::PvioVbd => BackendKind::PvioVbd,
            Self::Vbd => BackendKind::Vbd,
        }
    }
}

/// Arguments of `pvio attach-disk`.
#[derive(Debug, Clone, Args)]
pub struct AttachArgs {
    /// The guest's name or number
    pub guest: String,
    /// A path, or `[OPTIONS]FORMAT:PATH` with any format and option of docs/disks.md
    #[arg(value_parser = disk())]
    pub disk: Disk,
    /// The disk's name in the guest; the first free one, starting at xvda, if left out
    #[arg(long)]
    pub vdev: Option<Vdev>,
    /// More options, separated by commas, such as iops=1000,ro
    #[arg(short, long, value_name = "OPTIONS", value_parser = disk_options(), default_value = "")]
    pub options: DiskOptions,
    /// The name or number of the domain that serves it; if left out, dom0, or the driver domain of
    /// a hosted machine
    #[arg(long, value_name = "DOMAIN")]
    pub backend: Option<String>,
    /// The kind of backend that serves it
    #[arg(long, value_name = "KIND", default_value = "pvio-vbd")]
    pub kind: Kind,
    /// How long to wait for the backend, in seconds
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub wait: u64,
    #[command(flatten)]
    /// Which xenstore to use.
    pub store: StoreArgs,
}

/// Arguments of `pvio detach-disk`.
#[derive(Debug, Clone, Args)]
pub struct DetachArgs {
    /// The guest's name or number
    pub guest: String,
    /// The disk's name in the guest
    pub vdev: Vdev,
    /// How long frontend and backend may take to close, in seconds
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub wait: u64,
    /// Remove it even if the frontend or backend did not close
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    /// Which xenstore to use.
    pub store: StoreArgs,
}

/// Arguments of `pvio set-disk`.
#[derive(Debug, Clone, Args)]
pub struct SetArgs {
    /// The guest's name or number
    pub guest: String,
    /// The disk's name in the guest
    pub vdev: Vdev,
    /// The new settings, separated by commas, such as iops=500,latency=5ms
    #[arg(value_parser = disk_options())]
    pub options: DiskOptions,
    #[command(flatten)]
    /// Which xenstore to use.
    pub store: StoreArgs,
}

/// Arguments of `pvio list`.
#[derive(Debug, Clone, Args)]
pub struct ListArgs {
    /// Only the disks and NICs of this guest, by its name or number
    pub guest: Option<String>,
    /// As JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    /// Which xenstore to use.
    pub store: StoreArgs,
}

/// Returns the remedy of an error of [`disk`] or [`disk_options`].
#[must_use]
pub fn remedy(error: &(dyn Error + 'static)) -> Option<Cow<'static, str>> {
    let disk = error.downcast_ref::<DiskError>().map(Remedy::remedy);
    disk.or_else(|| error.downcast_ref::<OptionError>().map(Remedy::remedy)).flatten()
}

/// Returns the parser of an argument that specifies a disk.
pub fn disk() -> impl TypedValueParser<Value = Disk> {
    OsStringValueParser::new().try_map(|text| Disk::from_bytes(text.as_bytes()))
}

/// Returns the parser of an argument with disk options.
pub fn disk_options() -> impl TypedValueParser<Value = DiskOptions> {
    OsStringValueParser::new().try_map(|text| DiskOptions::from_bytes(text.as_bytes()))
}

/// The argument that every command that opens images takes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
pub struct ImageRootArgs {
    /// Open files that the header of an image names (backing files, extents) below this directory
    /// too, besides that of the image itself; may be given more than once
    #[arg(long = "image-root", value_name = "DIR")]
    pub roots: Vec<PathBuf>,
}

impl ImageRootArgs {
    /// Adds the directories to a disk's options, or to the defaults of all disks.
    ///
    /// # Errors
    /// One of them is not a directory.
    pub fn add_to(&self, options: &mut DiskOptions) -> Result<(), Failure> {
        for root in options.image_roots.iter_mut().flatten() {
            *root = absolute(&*root).map_err(Failure::foreign)?;
        }
        for root in &self.roots {
            if !root.is_dir() {
                return Err(Failure::input(
                    format!("the image root {} is not a directory", EscapedPath::new(root)),
                    "name a directory with --image-root",
                ));
            }
            let root = absolute(root).map_err(Failure::foreign)?;
            options.image_roots.get_or_insert_default().push(root);
        }
        Ok(())
    }
}
