//! The `pvio` command.
#![forbid(unsafe_code)]

fn main() {}
