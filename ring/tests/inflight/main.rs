//! The in-flight record, with the process killed at every store: searches all interleavings of the
//! production code with a correct guest. The guest must get one response to every request, and the
//! backend must execute only what the guest requested.

mod ordered;
mod requests;
mod search;
