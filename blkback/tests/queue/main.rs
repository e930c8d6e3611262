//! A queue against our own frontend and against a hostile one, over memory, on every data path.

mod durability;
mod frontends;
mod honest;
mod indirect;
mod kept;
mod killed;
mod late;
mod limits;
mod refusals;
mod refusals_by_reason;
mod rig;
mod unmappable;
