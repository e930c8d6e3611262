//! Runs every check of this platform on real Xen.
//!
//! ```text
//! selftest self                     both ends in this domain
//! selftest peer --at NODE           the other end, for a `use` in another domain
//! selftest use DOMAIN --at NODE     against a `peer` in DOMAIN
//! ```
//! `NODE` is a xenstore node that both domains may write: `/local/domain/<the guest of the
//! two>/data/pvio`. The program prints a line `PASS name` or `FAIL name: why` for each check, and
//! one with the counts at the end. The exit code is 0 if no check failed.

#[path = "../tests/checks/mod.rs"]
mod checks;
#[path = "selftest/remote.rs"]
mod remote;

use checks::{Outcome, World, copying, descriptors, mapping, run, run_alone, run_as_device, say};
use pvio_event_channel::{EventChannels, Port};
use pvio_grant_table::{Access, DomId, GrantMapper, GrantRef};
use pvio_ring::shm::Region;
use pvio_xen_linux::{UnmapNotify, XenDomain};
use remote::{RemotePeer, serve};
use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let done = match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["self"] => both_ends(),
        ["peer", "--at", node] => open().and_then(|domain| serve(domain, node)).map(|()| true),
        ["use", domain, "--at", node] => against(domain, node),
        ["hold", ..] => hold(&words[1..]).map(|()| true),
        _ => Err("selftest self | peer --at NODE | use DOMAIN --at NODE".into()),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            println!("FAIL: {why}");
            ExitCode::FAILURE
        }
    }
}

fn open() -> Result<XenDomain, String> {
    XenDomain::open().map_err(|error| format!("{}: {error}", error.code()))
}

fn both_ends() -> Result<bool, String> {
    let me = open()?;
    println!("this is domain {}", me.id());
    let (passed, failed) = run_alone(me, std::env::current_exe().ok());
    Ok(close(passed, failed))
}

fn against(domain: &str, node: &str) -> Result<bool, String> {
    let me = open()?;
    let id = DomId(domain.parse().map_err(|_| "DOMAIN is a number")?);
    println!("this is domain {}, the peer is domain {id}", me.id());
    let xs = me.xenstore().map_err(|error| error.to_string())?;
    let mut peer = RemotePeer::meet(id, node.to_owned(), xs)?;
    let holder = std::env::current_exe().ok();
    let mut world = World { me, is_device: false, peer: &mut peer, holder };
    let copying = run("across, ", &copying(), &mut world);
    let mapped = run("across, ", &mapping(), &mut world);
    let opened = run("across, ", &descriptors(), &mut world);
    let device = run_as_device("across, device, ", &[checks::copying(), mapping()], &mut world);
    peer.dismiss()?;
    let parts = [copying, mapped, opened, device];
    Ok(close(parts.iter().map(|part| part.0).sum(), parts.iter().map(|part| part.1).sum()))
}

fn close(passed: usize, failed: usize) -> bool {
    println!("selftest: {passed} passed, {failed} failed");
    failed == 0
}

/// Maps a page and waits; one of the checks kills it.
fn hold(words: &[String]) -> Outcome {
    let [domain, gref, port] = words else { return Err("hold DOMAIN GREF PORT".into()) };
    let me = open()?;
    let from = DomId(domain.parse().map_err(say)?);
    let gref = GrantRef(gref.parse().map_err(say)?);
    let bell = me.bind_interdomain(from, Port(port.parse().map_err(say)?)).map_err(say)?;
    let page = me.map(from, &[gref], Access::ReadWrite).map_err(say)?;
    page.write_bytes(2, &[7]).ok_or("not writable")?;
    let what = UnmapNotify { clear_byte: Some(0), send_event: Some(&bell) };
    page.notify_unmap(what).map_err(say)?;
    println!("holding");
    // Until it is killed, or the process that started it ends.
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).map_err(say).map(drop)
}
