//! Raw images: of any length, below an overlay or not, inspected whatever they resemble.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pvio_fuzz::image::{Damage, Template, run};
use pvio_storage::image::Format;

const TEMPLATES: &[Template] = &[Template {
    format: Format::Raw,
    // 64 KiB of zeroes.
    files: &[("disk.img", &[0, 0, 1, 0, 0, 0, 0, 0])],
    snapshot: None,
}];

fuzz_target!(|damage: Damage| run(TEMPLATES, &damage));
