//! A program without `std`, as a kernel is one: its own entry point, its own panic handler, no
//! unwinding. It links the device code and *runs* a piece of each crate, so that nothing is left
//! out by the linker; if anything below brought `std`, there would be two panic handlers, and it
//! would not build.
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

// The start-up code and `memcpy`; no Rust standard library.
#[link(name = "c")]
unsafe extern "C" {}

#[cfg(feature = "alloc")]
#[global_allocator]
static HEAP: emballoc::Allocator<{ 16 << 20 }> = emballoc::Allocator::new();

#[cfg(feature = "with-std")]
use std_user as _;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// What the C start-up code calls. The exit code is the number of the first part that went wrong.
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
