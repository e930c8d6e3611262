//! pvio, the command: the daemon of a driver domain on Xen, and a hosted hypervisor with a driver
//! domain and a guest as three processes.
//!
//! | module | holds |
//! |---|---|
//! | [`cli`] | the command line |
//! | [`failure`] | one clear line for what went wrong, and what to do |
//! | [`run`], [`check`] | the two commands |
//! | [`control`], [`capture`], [`stats`] | the door to a running driver domain; who looks at a NIC, and at what is counted, through it |
//! | [`served`] | its devices, as that door sees them |
//! | [`inspect`] | what a disk is kept in |
//! | [`disks`] | disks attached, changed and detached while a guest runs; all devices listed |
//! | [`machine`] | hypervisor and toolstack: domains, devices, child processes, their end |
//! | [`serve`] | the same driver domain on real Xen: the daemon |
//! | [`dm`] | the same, standing in for the device model of one guest |
//! | [`script`] | the hotplug script that lets `xl` name image files |
//! | [`revive`] | a driver domain's backends, after it came back |
//! | [`signals`], [`startup`] | signals that end the process; what the system must provide before anything starts |
//! | [`lock`] | one daemon for each kind of backend of a domain |
//! | [`descriptors`] | file descriptors, counted before a device takes them |
//! | [`contents`] | what a disk holds, by signature |
//! | [`scratch`] | whether an image may be overwritten |
//! | [`domain`] | what runs in the child processes |
//! | [`driver`] | the driver domain: serves every device the toolstack makes for it |
//! | [`guest`] | the guest: a read-only file system on its disk, an HTTP server on its NIC |
//! | [`demo`] | the demo image, made when no `--disk` is given |
#![forbid(unsafe_code)]

pub mod capture;
pub mod check;
pub mod cli;
pub mod contents;
pub mod control;
pub mod demo;
pub mod descriptors;
pub mod disks;
pub mod dm;
pub mod domain;
pub mod driver;
pub mod failure;
pub mod guest;
pub mod inspect;
pub mod lock;
pub mod machine;
pub mod revive;
pub mod run;
pub mod scratch;
pub mod script;
pub mod serve;
pub mod served;
pub mod signals;
pub mod startup;
pub mod stats;
