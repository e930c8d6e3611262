//! The vbd backend: virtual disks for guests
