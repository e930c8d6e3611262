//! Vifs with real ports, and guests with a TCP/IP stack or a kernel. One test program, since most
//! of the compile time is for shared code.

#[path = "../rig/mod.rs"]
mod rig;

mod afxdp;
mod broken;
mod kernel;
mod live;
mod moved;
mod queues;
mod segments;
mod switch;
mod wire;
