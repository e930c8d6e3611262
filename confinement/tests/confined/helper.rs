//! The image helper.

use crate::parent::{EACCES, Fate, KILLED, has, is_root, run, scenario};
use pvio_confinement::{Enforcement, FileAccess, Layer, ProcessKind, Root};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

pub const TESTS: &[(&str, fn())] = &[
    ("image_helper_opens_files_below_its_roots_only", roots),
    ("image_helper_with_missing_root_has_no_landlock", missing_root),
    ("image_helper_reaches_no_network", no_network),
];

/// Makes a directory that every user may write.
fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let image = directory.path().join("image");
    fs::write(&image, b"data").unwrap();
    fs::set_permissions(image, fs::Permissions::from_mode(0o666)).unwrap();
    directory
}

fn roots() {
    let [read, write, outside] = [directory(), directory(), directory()];
    let root = |path: &Path, write| Root { path: path.to_owned(), write };
    let files = FileAccess::Below(vec![root(read.path(), false), root(write.path(), true)]);
    for calls in [None, Some(Enforcement::Kill)] {
        for (attempt, directory, name, expected) in [
            ("open", &read, "image", Fate::Done),
            ("open", &write, "image", Fate::Done),
            ("open", &outside, "image", EACCES),
            ("open-for-writing", &read, "image", EACCES),
            ("open-for-writing", &write, "image", Fate::Done),
            ("open-for-writing", &outside, "image", EACCES),
            ("create", &write, "new", EACCES),
        ] {
            let mut scenario = scenario(ProcessKind::ImageHelper, calls, attempt);
            scenario.layers.files = files.clone();
            scenario.target = directory.path().join(name).to_str().unwrap().to_owned();
            let (applied, fate) = run(&scenario);
            if has(&applied, &[Layer::Landlock]) {
                assert_eq!(fate, expected, "{attempt} {}, {calls:?}", scenario.target);
            }
        }
    }
    // The file itself is accessible: only Landlock denies it.
    let mut scenario = scenario(ProcessKind::ImageHelper, None, "open-for-writing");
    scenario.layers.files = FileAccess::Unrestricted;
    scenario.target = outside.path().join("image").to_str().unwrap().to_owned();
    assert_eq!(run(&scenario).1, Fate::Done);
}

fn missing_root() {
    let mut scenario = scenario(ProcessKind::ImageHelper, None, "open-root");
    let path = "/no/such/directory".into();
    scenario.layers.files = FileAccess::Below(vec![Root { path, write: false }]);
    let (applied, _) = run(&scenario);
    assert!(!applied.has(Layer::Landlock));
    let text = applied.outcome(Layer::Landlock).to_string();
    assert!(text.starts_with("missing: ") && text.contains("/no/such/directory"), "{text}");
    assert_eq!(applied.has(Layer::User), is_root(), "the other layers are applied");
}

fn no_network() {
    let scenario = scenario(ProcessKind::ImageHelper, Some(Enforcement::Kill), "socket");
    let (applied, fate) = run(&scenario);
    if has(&applied, &[Layer::SystemCalls]) {
        assert_eq!(fate, KILLED);
    }
}
