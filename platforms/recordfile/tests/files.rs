//! Which directories of records are accepted, and which data survives in them.

use pvio_recordfile::RecordDir;
use pvio_ring::shm::{Region, SharedMemory};
use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::sync::atomic::Ordering::Relaxed;

const LEN: usize = 3 * 4096 + 64;

fn dir() -> (tempfile::TempDir, RecordDir) {
    let parent = tempfile::tempdir().unwrap();
    let dir = RecordDir::open(&parent.path().join("records")).unwrap();
    (parent, dir)
}

#[test]
fn created_record_file_is_zeroed_allocated_and_reopened() {
    let (parent, dir) = dir();
    let first = dir.create("disk", LEN).unwrap();
    assert_eq!((first.len(), first.load_u64(LEN - 8, Relaxed)), (LEN, Some(0)));
    let meta = fs::metadata(parent.path().join("records/disk")).unwrap();
    assert!(meta.blocks() * 512 >= LEN as u64, "file is not fully allocated");
    assert_eq!(meta.mode() & 0o777, 0o600);
    first.clone().store_u64(LEN - 8, 5, Relaxed);
    assert_eq!(dir.existing("disk", LEN).unwrap().load_u64(LEN - 8, Relaxed), Some(5));
    // Another session gets a new file; an existing mapping of the first one stays valid.
    let second = dir.create("disk", LEN).unwrap();
    assert_eq!(second.load_u64(LEN - 8, Relaxed), Some(0));
    assert_eq!(first.load_u64(LEN - 8, Relaxed), Some(5));
    dir.remove("disk").unwrap();
    dir.remove("disk").unwrap();
    assert_eq!(dir.existing("disk", LEN).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn existing_sparse_record_file_is_allocated() {
    let (parent, dir) = dir();
    let path = parent.path().join("records/disk");
    fs::File::create(&path).unwrap().set_len(LEN as u64).unwrap();
    let found = dir.existing("disk", LEN).unwrap();
    assert!(fs::metadata(&path).unwrap().blocks() * 512 >= LEN as u64);
    assert!(found.store_u64(LEN - 8, 1, Relaxed));
}

#[test]
fn short_record_file_or_invalid_name_is_an_error() {
    let (parent, dir) = dir();
    let path = parent.path().join("records/disk");
    fs::write(&path, vec![1; LEN - 1]).unwrap();
    assert_eq!(dir.existing("disk", LEN).unwrap_err().kind(), ErrorKind::InvalidData);
    fs::remove_file(&path).unwrap();
    fs::write(parent.path().join("elsewhere"), vec![1; LEN]).unwrap();
    symlink("../elsewhere", &path).unwrap();
    dir.existing("disk", LEN).unwrap_err();
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    dir.existing("disk", LEN).unwrap_err();
    for name in ["", ".", "..", "../elsewhere", "a/b", "a\0b"] {
        assert_eq!(dir.create(name, LEN).unwrap_err().kind(), ErrorKind::InvalidInput, "{name:?}");
        assert_eq!(dir.existing(name, LEN).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(dir.remove(name).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}

#[test]
fn record_dir_accessible_by_others_or_symlink_is_an_error() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("records");
    fs::create_dir(&path).unwrap();
    for mode in [0o770, 0o705, 0o711] {
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        let code = RecordDir::open(&path).unwrap_err().code();
        assert_eq!(code, if mode == 0o770 { "dir-writable" } else { "dir-open" });
    }
    fs::set_permissions(&path, Permissions::from_mode(0o700)).unwrap();
    RecordDir::open(&path).unwrap();
    let link = parent.path().join("link");
    symlink(&path, &link).unwrap();
    assert_eq!(RecordDir::open(&link).unwrap_err().code(), "dir-link");
    assert_eq!(RecordDir::open(&link.join("below")).unwrap_err().code(), "dir-link");
    assert!(!path.join("below").exists());
}
