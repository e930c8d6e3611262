//! A program without `std`, like a kernel or firmware: with its own entry point, panic handler and
//! allocator, and no unwinding.
//!
//! | module | contents |
//! |---|---|
//! | [`pages`] | shared memory without an allocator |
//! | [`transport`] | rings, grant tables, event channels and xenstore messages in it |
//! | [`machine`] | a platform: memory, grants and event channels of two domains |
//! | [`devices`] | disk and NIC, frontend and backend, on that platform |
//!
//! ```console
//! $ cargo run --release && echo every part works
//! ```
//!
//! It runs a part of each crate, so that the linker discards none of them. If any dependency used
//! `std`, there would be two panic handlers, and the program would not link.
#![no_std]
#![no_main]

#[cfg(feature = "alloc")]
extern crate alloc;

#[cfg(feature = "alloc")]
mod devices;
#[cfg(feature = "alloc")]
mod machine;
mod pages;
mod transport;

// For the start-up code and `memcpy`; not the Rust standard library.
#[link(name = "c")]
unsafe extern "C" {}

#[cfg(feature = "alloc")]
#[global_allocator]
static HEAP: emballoc::Allocator<{ 16 << 20 }> = emballoc::Allocator::new();

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Entry point that the C start-up code calls. The exit code is the number of the first part that failed.
// SAFETY: the name and the signature are those of C's `main`, of which a program has one.
#[unsafe(no_mangle)]
pub extern "C" fn main(_argc: i32, _argv: *const *const u8) -> i32 {
    let parts: &[fn() -> bool] = &[
        transport::ring,
        transport::grant_table,
        transport::event_channel,
        transport::xenstore,
        #[cfg(feature = "alloc")]
        devices::disk,
        #[cfg(feature = "alloc")]
        devices::nic,
    ];
    let wrong = parts.iter().position(|part| !part());
    wrong.map_or(0, |index| index as i32 + 1)
}
