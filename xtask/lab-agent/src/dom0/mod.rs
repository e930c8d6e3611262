//! dom0's part: brings it up and runs the scenarios the host asked for, in order.
//!
//! | module | holds |
//! |---|---|
//! | [`boot`] | xenstored, xenconsoled, a bridge, the folder shared with the host |
//! | [`report`] | what the host is told, and asked for |
//! | [`backend`] | whose backends serve: pvio's, the kernel's, QEMU's |
//! | [`disk`] | images and the lines `xl` wants for them |
//! | [`guest`] | a guest: made by `xl`, asked over its console, gone |
//! | [`console`] | that console |
//! | [`xs`] | xenstore |
//! | [`ledger`] | what must be as it was once a device is gone |
//! | [`words`] | what is shown of a scenario that failed |
//! | [`lab`] | all of that, as a scenario sees it |

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

/// Runs what the host asks for, one scenario after another.
///
/// # Errors
/// dom0 does not come up.
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
