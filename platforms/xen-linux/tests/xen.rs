//! The checks, where there is a Xen; `examples/selftest.rs` shows them one by one.

mod checks;

use checks::{LocalPeer, World, all, own, run};
use pvio_xen_linux::XenDomain;

#[test]
fn everything_holds_in_one_domain() {
    let me = match XenDomain::open() {
        Ok(me) => me,
        Err(error) => {
            println!("SKIPPED: {error}; or `cargo xtask lab`, which brings its own");
            return;
        }
    };
    let mut peer = LocalPeer::new(me.clone());
    let mut world = World { me, peer: &mut peer, holder: None };
    let (passed, failed) = run("own, ", &own(), &mut world);
    assert!(passed > 0 && failed == 0, "{failed} checks failed");
    let (passed, failed) = run("self, ", &all(), &mut world);
    assert!(passed > 0 && failed == 0, "{failed} checks failed");
}
