//! The vif backend: virtual NICs for guests
