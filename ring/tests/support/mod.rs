pub mod c_compiler;
pub mod c_peer;
pub mod items;
pub mod shared_file;
