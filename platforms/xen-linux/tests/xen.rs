//! Runs the checks on machines with Xen; `examples/selftest.rs` runs them one by one.

mod checks;

use checks::run_alone;
use pvio_xen_linux::XenDomain;

#[test]
fn all_checks_pass_within_one_domain() {
    let me = match XenDomain::open() {
        Ok(me) => me,
        Err(error) => {
            println!("SKIPPED: {error}; or `cargo xtask lab`, which brings its own");
            return;
        }
    };
    let (passed, failed) = run_alone(me, None);
    assert!(passed > 0 && failed == 0, "{failed} checks failed");
}
