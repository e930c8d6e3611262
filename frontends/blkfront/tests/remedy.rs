//! Error text and remedy for a disk that no backend serves.
#![cfg(feature = "std")]

use pvio_blkfront::blocking::DiskError;
use pvio_ring::error::Remedy;
use pvio_xenbus::XenbusState as S;
use std::time::Duration;

#[test]
fn no_backend_error_gives_remedy_by_backend_state() {
    for (state, sector_size, says) in [
        (S::Unknown, None, "domain is running"),
        (S::Initialising, None, "kernel module"),
        (S::InitWait, Some(4096), "sectors of 512 bytes"),
        (S::InitWait, Some(512), "/local/domain/3/error/backend/qdisk/5/51712/error"),
        (S::InitWait, None, "/local/domain/3/error/backend/qdisk/5/51712/error"),
        (S::Closed, Some(4096), "/local/domain/3/error/backend/qdisk/5/51712/error"),
    ] {
        let backend = String::from("/local/domain/3/backend/qdisk/5/51712");
        let waited = Duration::from_secs(2);
        let error = DiskError::NoBackend { waited, state, backend, sector_size };
        let remedy = error.remedy().expect("error has a remedy");
        assert!(remedy.contains(says), "{state}: {remedy}");
        let text = error.to_string();
        assert!(text.contains("qdisk/5/51712") && text.contains(&state.to_string()), "{text}");
        assert!(!text.contains("driver domain") && !remedy.contains("driver domain"));
    }
    assert_eq!(DiskError::Closed(String::new()).remedy(), None);
}
