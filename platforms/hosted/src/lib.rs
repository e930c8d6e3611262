//! The hosted hypervisor: domains are processes
