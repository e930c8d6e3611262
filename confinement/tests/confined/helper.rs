//! The image helper.

use crate::parent::{EACCES, Fate, KILLED, has, run, scenario};
use pvio_confinement::{Enforcement, FileAccess, Layer, ProcessKind, Root};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

pub const TESTS: &[(&str, fn())] = &[
    ("image_helper_opens_files_below_its_roots_only", roots),
    ("image_helper_with_missing_root_opens_files_below_the_others_only", missing_root),
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
    let present = directory();
    let root = |path: &Path| Root { path: path.to_owned(), write: false };
    let roots = vec![root(Path::new("/no/such/directory")), root(present.path())];
    let image = present.path().join("image").to_str().unwrap().to_owned();
    for (target, expected) in [("/", EACCES), (image.as_str(), Fate::Done)] {
        let mut scenario = scenario(ProcessKind::ImageHelper, None, "open");
        scenario.layers.files = FileAccess::Below(roots.clone());
        scenario.target = target.to_owned();
        let (applied, fate) = run(&scenario);
        if has(&applied, &[Layer::Landlock]) {
            assert_eq!(fate, expected, "{target}");
            let text = applied.outcome(Layer::Landlock).to_string();
            assert!(text.contains("; /no/such/directory cannot be opened"), "{text}");
        }
    }
}

fn no_network() {
    let scenario = scenario(ProcessKind::ImageHelper, Some(Enforcement::Kill), "socket");
    let (applied, fate) = run(&scenario);
    if has(&applied, &[Layer::SystemCalls]) {
        assert_eq!(fate, KILLED);
    }
}
