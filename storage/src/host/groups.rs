//! Limits that several disks share.

use crate::engine::throttle::Throttles;
use crate::image::DiskOptions;
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::sync::{Arc, Weak};
use std::sync::{Mutex, PoisonError};

/// Named limits that the disks of a driver domain can share.
#[derive(Clone, Debug, Default)]
pub struct Groups(Arc<Mutex<BTreeMap<String, Weak<Throttles>>>>);

impl Groups {
    /// Returns the limits of that name: those that other disks use, or new ones, initially
    /// unlimited.
    #[must_use]
    pub fn named(&self, name: &str) -> Arc<Throttles> {
        let mut groups = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        groups.retain(|_, group| group.strong_count() > 0);
        if let Some(group) = groups.get(name).and_then(Weak::upgrade) {
            return group;
        }
        let group = Arc::default();
        groups.insert(name.into(), Arc::downgrade(&group));
        group
    }

    /// Returns the limits of a disk with these options: those of its group, which are changed if
    /// the options contain limits, or its own.
    #[must_use]
    pub fn throttles(&self, options: &DiskOptions) -> Arc<Throttles> {
        let limits = options.limits();
        let Some(group) = &options.group else { return Arc::new(Throttles::new(limits)) };
        let group = self.named(group);
        if options.says_limits() && group.limits() != limits {
            group.set(limits);
        }
        group
    }
}
