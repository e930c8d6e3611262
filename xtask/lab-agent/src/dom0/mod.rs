//! The agent in dom0: boots dom0 and runs the scenarios that the host requests, in order.
//!
//! | module | contents |
//! |---|---|
//! | [`boot`] | xenstored, xenconsoled, a bridge, the directory shared with the host |
//! | [`report`] | communication with the host |
//! | [`backend`] | the backends under test: pvio's, the kernel's, QEMU's |
//! | [`disk`] | images and their lines in an `xl` configuration |
//! | [`guest`] | a guest: created by `xl`, controlled over its console, destroyed |
//! | [`console`] | that console |
//! | [`xs`] | xenstore |
//! | [`ledger`] | resources that must be released when a device is removed |
//! | [`words`] | logs for the report of a scenario that failed |
//! | [`lab`] | the interface of a scenario to all of these |

pub mod backend;
mod boot;
mod console;
pub mod disk;
pub mod guest;
pub mod lab;
pub mod ledger;
pub mod outcome;
mod report;
pub mod wait;
pub mod words;
pub mod xs;

use anyhow::Result;

use crate::sys::uptime;
use lab::Lab;
use report::Host;

/// Runs the scenarios that the host requests, one after another.
///
/// # Errors
/// dom0 does not boot.
pub fn run() -> Result<()> {
    boot::up()?;
    println!("PVIO-LAB dom0 up after {:.1} s", uptime::seconds());
    if let Some(words) = report::shell() {
        return boot::shell(&words);
    }
    let mut host = Host::new()?;
    Host::stay_alive();
    host.ready()?;
    let mut lab = Lab::default();
    while let Some(id) = host.next()? {
        println!("PVIO-LAB start {id}");
        let outcome = lab.run(&id);
        println!("PVIO-LAB end {id}: {}, up {:.1} s", outcome.word(), uptime::seconds());
        host.ended(&id, &outcome, &lab)?;
    }
    lab.close();
    host.done()
}
