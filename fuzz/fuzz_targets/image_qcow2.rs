//! qcow2 images: damaged in their metadata, opened, read and written.
//!
//! An image that is not damaged holds what is written to it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pvio_fuzz::image::{Damage, Template, catch_library_panics, run};
use pvio_storage::image::Format;

/// 128 KiB of zeroes.
const BASE: &[u8] = &[0, 0, 2, 0, 0, 0, 0, 0];

const TEMPLATES: &[Template] = &[
    Template {
        format: Format::Qcow2,
        files: &[("plain.qcow2", include_bytes!("../images/plain.qcow2.sparse"))],
        snapshot: Some("s"),
    },
    Template {
        format: Format::Qcow2,
        files: &[("packed.qcow2", include_bytes!("../images/packed.qcow2.sparse"))],
        snapshot: None,
    },
    Template {
        format: Format::Qcow2,
        files: &[("old.qcow2", include_bytes!("../images/old.qcow2.sparse"))],
        snapshot: None,
    },
    Template {
        format: Format::Qcow2,
        files: &[
            ("layer.qcow2", include_bytes!("../images/layer.qcow2.sparse")),
            ("base.raw", BASE),
        ],
        snapshot: None,
    },
];

fuzz_target!(init: catch_library_panics(), |damage: Damage| run(TEMPLATES, &damage));
