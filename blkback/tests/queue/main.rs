//! Tests of a queue with pvio's frontend and with a hostile one, with a disk in memory, on every
//! data path.

mod cached;
mod durability;
mod frontends;
mod honest;
mod indirect;
mod killed;
mod late;
mod limits;
mod refusals;
mod refusals_by_reason;
mod rig;
mod unmappable;
