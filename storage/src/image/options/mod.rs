//! Options of a disk as an operator writes them: separated by commas, parsed only here. [`KEYS`]
//! lists all of them.

mod keys;
mod text;
pub(super) mod values;

#[cfg(test)]
mod tests;

pub use crate::engine::IoMode;
pub use keys::{KEYS, OptionError};
use pvio_blkback::Config;

use crate::engine::faults::FaultPlan;
use crate::engine::throttle::{Quota, ThrottleLimits};
use crate::image::ImageOptions;
use crate::image::reference::ReferencePolicy;
use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;
use pvio_blkback::path::Policy;
use pvio_runtime::BucketRate;
use std::path::PathBuf;

/// Defines the options, with the functions that handle all of them.
macro_rules! options {
    ($($(#[$doc:meta])* $field:ident: $kind:ty,)*) => {
        /// The options of a disk, as far as given.
        #[derive(Clone, PartialEq, Eq, Debug, Default)]
        pub struct DiskOptions {
            $($(#[$doc])* pub $field: Option<$kind>,)*
        }

        impl DiskOptions {
            /// Returns these options, with `others` for those that are not set here.
            #[must_use]
            pub fn or(self, others: Self) -> Self {
                Self { $($field: self.$field.or(others.$field),)* }
            }
        }
    };
}

options! {
    /// `ro`, `rw`
    read_only: bool,
    /// `direct`, `buffered`
    direct: bool,
    /// `overlay`
    overlay: bool,
    /// `sector`, in bytes
    sector: u32,
    /// `physical`, in bytes
    physical: u32,
    /// `discard`
    discard: bool,
    /// `io`
    io: IoMode,
    /// `policy`
    policy: Policy,
    /// `answers`: in order; has no effect
    in_order: bool,
    /// `queues`
    queues: u32,
    /// `ring-order`
    ring_order: u32,
    /// `indirect`
    indirect: u32,
    /// `iops`; `Some(None)` is unlimited
    iops: Option<BucketRate>,
    /// `bps`
    bps: Option<BucketRate>,
    /// `read-iops`
    read_iops: Option<BucketRate>,
    /// `read-bps`
    read_bps: Option<BucketRate>,
    /// `write-iops`
    write_iops: Option<BucketRate>,
    /// `write-bps`
    write_bps: Option<BucketRate>,
    /// `group`
    group: String,
    /// `latency`
    latency: Duration,
    /// `jitter`
    jitter: Duration,
    /// `fail-reads`, per million
    fail_reads: u32,
    /// `fail-writes`, per million
    fail_writes: u32,
    /// `fail-flushes`, per million
    fail_flushes: u32,
    /// `errno`
    errno: i32,
    /// `seed`
    seed: u64,
    /// `on-full`: pause
    pause_when_full: bool,
    /// `trace`
    trace: PathBuf,
    /// `busy-timeout`
    busy_timeout: Duration,
    /// `image-root`, all of them
    image_roots: Vec<PathBuf>,
    /// `write-extents`: any
    write_any_extent: bool,
    /// `trusted`: evaluated by the toolstack that creates the disk
    trusted: bool,
    /// `removable`: evaluated by the toolstack that creates the disk
    removable: bool,
    /// `cdrom`: evaluated by the toolstack that creates the disk
    cdrom: bool,
}

impl DiskOptions {
    /// Returns the rate limits.
    #[must_use]
    pub fn limits(&self) -> ThrottleLimits {
        let quota = |operations: Option<Option<BucketRate>>, bytes: Option<Option<BucketRate>>| {
            Quota { operations: operations.flatten(), bytes: bytes.flatten() }
        };
        ThrottleLimits {
            all: quota(self.iops, self.bps),
            reads: quota(self.read_iops, self.read_bps),
            writes: quota(self.write_iops, self.write_bps),
        }
    }

    /// Returns whether any limit is set, including `none`.
    #[must_use]
    pub const fn says_limits(&self) -> bool {
        self.iops.is_some()
            || self.bps.is_some()
            || self.read_iops.is_some()
            || self.read_bps.is_some()
            || self.write_iops.is_some()
            || self.write_bps.is_some()
    }

    /// Returns the options for opening the image.
    pub(super) fn image_options(&self) -> ImageOptions {
        ImageOptions {
            read_only: self.read_only.unwrap_or_default(),
            direct: self.direct.unwrap_or_default(),
        }
    }

    /// Returns the policy for files that the headers of its images name.
    pub(super) fn references(&self) -> ReferencePolicy {
        ReferencePolicy {
            roots: self.image_roots.clone().unwrap_or_default(),
            write_any: self.write_any_extent.unwrap_or_default(),
        }
    }

    /// Returns the fault plan.
    #[must_use]
    pub fn faults(&self) -> FaultPlan {
        const EIO: i32 = 5;
        FaultPlan {
            latency: self.latency.unwrap_or_default(),
            jitter: self.jitter.unwrap_or_default(),
            reads: self.fail_reads.unwrap_or_default(),
            writes: self.fail_writes.unwrap_or_default(),
            flushes: self.fail_flushes.unwrap_or_default(),
            errno: self.errno.unwrap_or(EIO),
        }
    }

    /// Returns the device's settings, with `usual` for those that are not set here.
    #[must_use]
    pub fn config(&self, usual: Config) -> Config {
        Config {
            policy: self.policy.unwrap_or(usual.policy),
            max_queues: self.queues.unwrap_or(usual.max_queues),
            max_ring_page_order: self.ring_order.unwrap_or(usual.max_ring_page_order),
            max_indirect_segments: self.indirect.unwrap_or(usual.max_indirect_segments),
        }
    }

    /// Returns only the options that can be changed while the disk is served: limits, delays,
    /// failures and `on-full`.
    #[must_use]
    pub fn live(&self) -> Self {
        let Self { iops, bps, read_iops, read_bps, write_iops, write_bps, .. } = *self;
        let Self { latency, jitter, fail_reads, fail_writes, fail_flushes, errno, .. } = *self;
        let Self { pause_when_full, .. } = *self;
        Self {
            iops,
            bps,
            read_iops,
            read_bps,
            write_iops,
            write_bps,
            latency,
            jitter,
            fail_reads,
            fail_writes,
            fail_flushes,
            errno,
            pause_when_full,
            ..Self::default()
        }
    }

    /// Returns only the options that take effect when the disk is attached.
    #[must_use]
    pub fn fixed(&self) -> Self {
        let none = Self::default();
        Self {
            iops: none.iops,
            bps: none.bps,
            read_iops: none.read_iops,
            read_bps: none.read_bps,
            write_iops: none.write_iops,
            write_bps: none.write_bps,
            latency: none.latency,
            jitter: none.jitter,
            fail_reads: none.fail_reads,
            fail_writes: none.fail_writes,
            fail_flushes: none.fail_flushes,
            errno: none.errno,
            pause_when_full: none.pause_when_full,
            ..self.clone()
        }
    }
}
