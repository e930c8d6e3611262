//! The driver domain: serves every disk and network interface the toolstack makes for it.
//!
//! One thread watches xenstore and steps the devices; each device's queue has a thread of its own.
//! It sleeps until xenstore, a worker or its parent has something to say. When its standard input
//! ends, it closes every device in good order and returns.

mod devices;

use anyhow::{Context, Result};
use devices::Devices;
use pvio_blkback::Vbd;
use pvio_blkback::host::ImageServer;
use pvio_hosted::Domain;
use pvio_xenbus::Xenstore;
use pvio_xenbus::client::Client;
use pvio_xenbus::driver::BackendDriver;
use pvio_xenbus::handshake::common::DeviceClass;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe, stdin};
use std::path::Path;
use std::sync::Arc;

/// Runs the driver domain until its standard input ends.
///
/// # Errors
/// When the hypervisor or xenstore is gone.
pub fn run(state_dir: &Path, id: pvio_grant_table::DomId) -> Result<()> {
    let domain = Domain::join(state_dir, id).context("joining as the driver domain")?;
    let mut xs = domain.xenstore().context("connecting to xenstore")?;
    let (woken, wake) = waker()?;

    let platform = domain.clone();
    let disk_wake = Arc::clone(&wake);
    let mut disks = Devices::new(DeviceClass::Vbd, id, move |addr| {
        let server = ImageServer::new(Arc::clone(&disk_wake));
        // A frontend that is Connected already was served by a predecessor of this process.
        BackendDriver::restarted(addr, Vbd::new(platform.clone(), server))
    });
    disks.watch(&mut xs)?;
    tracing::info!(domain = id.0, "the driver domain serves");

    loop {
        while let Some(event) = xs.poll_event()? {
            disks.event(&mut xs, &event)?;
        }
        match sleep(&xs, &woken)? {
            Woken::Xenstore => {}
            Woken::Worker => disks.step_all(&mut xs)?,
            Woken::Parent => break,
        }
    }
    tracing::info!("closing every device");
    disks.shut_down(&mut xs)?;
    Ok(())
}

/// What ended a sleep.
enum Woken {
    Xenstore,
    Worker,
    Parent,
}

fn sleep(xs: &Client, woken: &PipeReader) -> Result<Woken> {
    let stdin = stdin();
    let mut fds = [
        PollFd::new(&stdin, PollFlags::IN),
        PollFd::new(woken, PollFlags::IN),
        PollFd::new(xs, PollFlags::IN),
    ];
    match poll(&mut fds, None) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error).context("waiting for something to do"),
    }
    let [parent, worker, _] = fds.map(|fd| !fd.revents().is_empty());
    if parent && stdin.lock().read(&mut [0; 64])? == 0 {
        return Ok(Woken::Parent);
    }
    if worker {
        let _ = (&*woken).read(&mut [0; 64])?;
        return Ok(Woken::Worker);
    }
    Ok(Woken::Xenstore)
}

type Wake = Arc<dyn Fn() + Send + Sync>;

/// A pipe by which workers wake the thread that steps the devices.
fn waker() -> Result<(PipeReader, Wake)> {
    let (woken, wake): (PipeReader, PipeWriter) = pipe()?;
    let wake = Arc::new(move || {
        // A full pipe wakes as well as a byte more.
        let _ = (&wake).write(&[1]);
    });
    Ok((woken, wake))
}
