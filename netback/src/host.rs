//! Serving vifs through taps, a thread per queue: what a driver domain does.
#![forbid(unsafe_code)]

use crate::Platform;
use crate::port::tap::{Tap, TapConfig};
use crate::queue::Queue;
use crate::vif::{Attach, Serve};
use crate::worker::Worker;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use core::fmt;
use core::net::Ipv4Addr;
use pvio_uring::PrivateBuf;
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::vif::ToolstackBack;
use std::os::fd::AsFd;

/// What the driver domain adds to what the toolstack says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TapOptions {
    /// The tap's name, if the toolstack gives none (`vifname`); else `vif<domain>.<handle>`, as
    /// Linux has it.
    pub name: Option<String>,
    /// The bridge to join, if the toolstack names none (`bridge`).
    pub bridge: Option<String>,
    /// An address of the driver domain on this link, and its prefix length.
    pub address: Option<(Ipv4Addr, u8)>,
}

/// Serves a vif through a tap, whose carrier says whether a guest is there.
pub struct TapServer {
    options: TapOptions,
    wake: Arc<dyn Fn() + Send + Sync>,
    tap: Option<Tap>,
}

impl TapServer {
    /// `wake` is called by a worker that ended by itself: step the driver then.
    #[must_use]
    pub fn new(options: TapOptions, wake: Arc<dyn Fn() + Send + Sync>) -> Self {
        Self { options, wake, tap: None }
    }

    /// The tap, once there is one.
    #[must_use]
    pub fn tap(&self) -> Option<&Tap> {
        self.tap.as_ref()
    }

    fn config(&self, vif: &ToolstackBack, attach: Attach) -> TapConfig {
        let usual = format!("vif{}.{}", vif.frontend_id, vif.handle);
        if attach == Attach::ByScript {
            let mut config = TapConfig::new(usual);
            config.mtu = vif.mtu.unwrap_or(config.mtu);
            config.up = false;
            return config;
        }
        let name = vif.vifname.clone().or_else(|| self.options.name.clone());
        let mut config = TapConfig::new(name.unwrap_or(usual));
        config.mtu = vif.mtu.unwrap_or(config.mtu);
        config.bridge = vif.bridge.clone().or_else(|| self.options.bridge.clone());
        config.address = self.options.address;
        config
    }

    fn carrier(&self, on: bool) {
        if let Some(tap) = &self.tap
            && let Err(error) = tap.set_carrier(on)
        {
            // Older kernels cannot; the host then believes that somebody is always there.
            tracing::debug!(tap = tap.name(), %error, "carrier not set");
        }
    }
}

impl<P> Serve<P> for TapServer
where
    P: Platform + Send + 'static,
    P::Channel: AsFd,
{
    type Buf = PrivateBuf;
    type Running = Worker;

    fn open(&mut self, vif: &ToolstackBack, attach: Attach) -> Result<(), Fault> {
        let tap = Tap::create(&self.config(vif, attach)).map_err(|e| Fault::new(e.code(), e))?;
        self.tap = Some(tap);
        self.carrier(false);
        Ok(())
    }

    fn start(&mut self, name: &str, queue: Queue<P, PrivateBuf>) -> Result<Worker, Fault> {
        let no_tap = || Fault::new("tap-missing", "no tap is open");
        let tap = self.tap.as_ref().ok_or_else(no_tap)?.try_clone();
        let tap = tap.map_err(|e| Fault::new(e.code(), e))?;
        let wake = Arc::clone(&self.wake);
        let worker = Worker::start(name, queue, tap, move || wake())
            .map_err(|e| Fault::new("worker", format!("the queue's worker cannot start: {e}")))?;
        self.carrier(true);
        Ok(worker)
    }

    fn stopped(&mut self) {
        self.carrier(false);
    }

    fn fault(&mut self, running: &mut Worker) -> Option<Fault> {
        running.error().map(|error| Fault::new(error.code(), error))
    }
}

impl fmt::Debug for TapServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TapServer")
            .field("options", &self.options)
            .field("tap", &self.tap)
            .finish_non_exhaustive()
    }
}
