//! Access of the fuzz targets to the storage of an image, without the threads that serve it.

use super::metadata::Meter;
use super::open::open;
use super::provider::LocalFiles;
use super::reference::ReferencePolicy;
use super::{ImageError, ImageOptions, Spec};
use crate::engine::Geometry;
use crate::engine::store::Store;
use alloc::sync::Arc;

/// Opens a disk in files. Its operations are calls.
///
/// # Errors
/// Any [`ImageError`].
pub fn open_store(
    spec: &Spec,
    options: ImageOptions,
) -> Result<(Arc<dyn Store>, Geometry), ImageError> {
    let policy = ReferencePolicy::default();
    let (storage, geometry) = open(spec, options, &LocalFiles(&policy), &Meter::default())?;
    let store = storage.into_store();
    let path = || spec.path().map(Into::into).unwrap_or_default();
    Ok((store.map_err(|error| ImageError::Other { path: path(), error })?, geometry))
}
