//! The daemon of a driver domain, and the toolstack commands for its devices.
//!
//! | module | contents |
//! |---|---|
//! | [`serve`] | `pvio serve`: the daemon on Xen |
//! | [`dm`] | `pvio-dm`: the same, in place of the device model of one guest |
//! | [`driver`] | serves every device that the toolstack creates for a domain, on any platform |
//! | [`budget`] | the steps and transitions that one device may cost the control thread |
//! | [`process`], [`isolation`] | devices in processes of their own, and the options for that |
//! | [`served`] | the devices that a driver serves, as the control socket reports them |
//! | [`control`] | the control socket: server and client |
//! | [`stats`], [`capture`], [`confinement`] | `pvio stats`, `pvio capture` and `pvio confinement`, clients of that socket |
//! | [`upgrade`] | `pvio upgrade`: another binary takes the place of the running one |
//! | [`disks`] | `pvio attach-disk`, `detach-disk`, `set-disk` and `list` |
//! | [`inspect`] | `pvio inspect`: format, size and chain of an image |
//! | [`revive`] | `pvio revive`: backend directories of a restored driver domain |
//! | [`script`] | `block-pvio` and `vif-pvio`: hotplug scripts for `xl` |
//! | [`nics`] | options of NICs that several commands take |
//! | [`lock`] | one daemon for each kind of backend and domain |
//! | [`descriptors`] | file descriptors, reserved before a device is served |
//! | [`startup`], [`signals`] | checks of the system's resources at start; signals |
//! | [`stop`] | a stop request that threads can wait for |
//! | [`failure`], [`units`] | an error with its remedy on one line; human-readable sizes |
#![forbid(unsafe_code)]

pub mod budget;
pub mod capture;
pub mod confinement;
pub mod control;
pub mod descriptors;
pub mod disks;
pub mod dm;
pub mod driver;
pub mod failure;
pub mod inspect;
pub mod isolation;
pub mod lock;
pub mod nics;
pub mod process;
pub mod revive;
pub mod script;
pub mod serve;
pub mod served;
pub mod signals;
pub mod startup;
pub mod stats;
pub mod stop;
pub mod units;
pub mod upgrade;
