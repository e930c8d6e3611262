//! Request numbers of `ioctl` that device processes use after their start.
//!
//! `pvio-xen-linux`, `pvio-ports` and `pvio-blockdev` make these requests. A layer below them cannot
//! name their constants, so the numbers are repeated here, with the names of Linux's headers.

/// `_IOC(_IOC_NONE, group, number, size)`.
const fn none(group: u8, number: u8, size: usize) -> u32 {
    (size as u32) << 16 | (group as u32) << 8 | number as u32
}

/// `IOCTL_GNTDEV_MAP_GRANT_REF` (`xen/gntdev.h`).
pub const GNTDEV_MAP_GRANT_REF: u32 = none(b'G', 0, 24);
/// `IOCTL_GNTDEV_UNMAP_GRANT_REF`.
pub const GNTDEV_UNMAP_GRANT_REF: u32 = none(b'G', 1, 16);
/// `IOCTL_GNTDEV_GRANT_COPY`.
pub const GNTDEV_GRANT_COPY: u32 = none(b'G', 8, 16);
/// `IOCTL_EVTCHN_UNBIND` (`xen/evtchn.h`).
pub const EVTCHN_UNBIND: u32 = none(b'E', 3, 4);
/// `IOCTL_EVTCHN_NOTIFY`.
pub const EVTCHN_NOTIFY: u32 = none(b'E', 4, 4);
/// `IOCTL_EVTCHN_RESET`.
pub const EVTCHN_RESET: u32 = none(b'E', 5, 0);
/// `TUNSETCARRIER` (`linux/if_tun.h`).
pub const TUNSETCARRIER: u32 = 0x4004_54e2;
/// `TUNSETOFFLOAD`.
pub const TUNSETOFFLOAD: u32 = 0x4004_54d0;
/// `BLKDISCARD` (`linux/fs.h`).
pub const BLKDISCARD: u32 = none(0x12, 119, 0);
/// `BLKSECDISCARD`.
pub const BLKSECDISCARD: u32 = none(0x12, 125, 0);
/// `BLKSSZGET`.
pub const BLKSSZGET: u32 = none(0x12, 104, 0);
/// `BLKPBSZGET`.
pub const BLKPBSZGET: u32 = none(0x12, 123, 0);
/// `BLKGETSIZE64`.
pub const BLKGETSIZE64: u32 = 0x8008_1272;
/// `FIONBIO`.
pub const FIONBIO: u32 = 0x5421;

/// Requests of a device process of a disk.
pub const DISK: &[u32] = &[
    GNTDEV_MAP_GRANT_REF,
    GNTDEV_UNMAP_GRANT_REF,
    GNTDEV_GRANT_COPY,
    EVTCHN_UNBIND,
    EVTCHN_NOTIFY,
    EVTCHN_RESET,
    BLKDISCARD,
    BLKSECDISCARD,
    BLKGETSIZE64,
    FIONBIO,
];

/// Requests of a device process of a NIC.
pub const NIC: &[u32] = &[
    GNTDEV_MAP_GRANT_REF,
    GNTDEV_UNMAP_GRANT_REF,
    GNTDEV_GRANT_COPY,
    EVTCHN_UNBIND,
    EVTCHN_NOTIFY,
    EVTCHN_RESET,
    TUNSETCARRIER,
    TUNSETOFFLOAD,
];

/// Requests of the image helper. Whether a block device can discard is found out by a discard with an
/// invalid range. Only the disk's own image is open for writing.
pub const IMAGE_HELPER: &[u32] =
    &[BLKGETSIZE64, BLKSSZGET, BLKPBSZGET, BLKDISCARD, BLKSECDISCARD, FIONBIO];
