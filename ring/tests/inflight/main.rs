//! The in-flight record, killed at every store: all interleavings of the very code that runs with an
//! honest guest are searched. A guest must see every request answered once, and a backend must execute
//! what the guest asked for and nothing else.

mod ordered;
mod requests;
mod search;
