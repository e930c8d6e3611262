//! The pvio command.
fn main() {}
