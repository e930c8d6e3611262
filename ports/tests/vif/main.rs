//! A vif served through real ports, and guests with a TCP/IP stack or a kernel at its other end. One
//! program, since what they have in common takes a compiler longest.

#[path = "../rig/mod.rs"]
mod rig;

mod afxdp;
mod broken;
mod kernel;
mod live;
mod queues;
mod segments;
mod switch;
mod wire;
