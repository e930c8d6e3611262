//! Compiles C against Xen's headers.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Returns whether C can be compiled against Xen's headers here. If not, prints the reason,
/// bypassing the test harness's capture.
pub fn can_compile(test: &str) -> bool {
    let probe = Command::new("cc")
        .args(["-fsyntax-only", "-x", "c", "-include", "stdint.h"])
        .args(["-include", "xen/xen.h", "-include", "xen/io/ring.h", "/dev/null"])
        .output();
    let why = match probe {
        Ok(output) if output.status.success() => return true,
        Ok(_) => "Xen's public headers are missing; install libxen-dev",
        Err(_) => "there is no C compiler; install gcc",
    };
    writeln!(std::io::stderr(), "SKIPPED: {test}: {why}").expect("standard error");
    false
}

/// Compiles one of the programs in `tests/conformance` into `dir`.
pub fn compile(source: &str, flags: &[&str], dir: &Path) -> PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance").join(source);
    let program = dir.join(source.trim_end_matches(".c"));
    let output = Command::new("cc")
        .args(["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"])
        .args(flags)
        .arg("-o")
        .args([&program, &from])
        .output()
        .expect("the compiler was there a moment ago");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    program
}
