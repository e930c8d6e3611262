//! VMDK images and their descriptors: damaged in their metadata, opened, read and written.
//!
//! An image that is not damaged holds what is written to it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pvio_fuzz::image::{Damage, Template, catch_library_panics, run};
use pvio_storage::image::Format;

/// 256 KiB of zeroes.
const FLAT: &[u8] = &[0, 0, 4, 0, 0, 0, 0, 0];

const TEMPLATES: &[Template] = &[
    Template {
        format: Format::Vmdk,
        files: &[("sparse.vmdk", include_bytes!("../images/sparse.vmdk.sparse"))],
        snapshot: None,
    },
    Template {
        format: Format::Vmdk,
        files: &[("stream.vmdk", include_bytes!("../images/stream.vmdk.sparse"))],
        snapshot: None,
    },
    Template {
        format: Format::Vmdk,
        files: &[
            ("flat.vmdk", include_bytes!("../images/flat.vmdk.sparse")),
            ("flat-flat.vmdk", FLAT),
        ],
        snapshot: None,
    },
    Template {
        format: Format::Vmdk,
        files: &[
            ("split.vmdk", include_bytes!("../images/split.vmdk.sparse")),
            ("split-s001.vmdk", include_bytes!("../images/split-s001.vmdk.sparse")),
        ],
        snapshot: None,
    },
];

fuzz_target!(init: catch_library_panics(), |damage: Damage| run(TEMPLATES, &damage));
