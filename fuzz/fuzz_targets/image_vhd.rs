//! VHD images: damaged in their metadata, opened, read and written.
//!
//! An image that is not damaged holds what is written to it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pvio_fuzz::image::{Damage, Template, catch_library_panics, run};
use pvio_storage::image::Format;

const TEMPLATES: &[Template] = &[
    Template {
        format: Format::Vhd,
        files: &[("dyn.vhd", include_bytes!("../images/dyn.vhd.sparse"))],
        snapshot: None,
    },
    Template {
        format: Format::Vhd,
        files: &[("fix.vhd", include_bytes!("../images/fix.vhd.sparse"))],
        snapshot: None,
    },
];

fuzz_target!(init: catch_library_panics(), |damage: Damage| run(TEMPLATES, &damage));
