//! Models of backends that react to their frontend's state. Each follows the state switch of its
//! source: `xen-blkback/xenbus.c` and `xen-netback/xenbus.c` of Linux 6.1, `hw/block/xen-block.c`,
//! `hw/net/xen_nic.c` and `hw/xen/xen-bus.c` of QEMU 10; pvio's is the driver itself.

use pvio_xenbus::driver::{BackendClass, BackendContext, BackendDriver, Fault, Prepared};
use pvio_xenbus::handshake::HandshakeError;
use pvio_xenbus::handshake::common::{DeviceAddr, read_state, state_path, write_state};
use pvio_xenbus::{XenbusState, XenbusState as S, Xenstore};
use pvio_xenstored::LocalClient;

/// The key with which the test's frontends submit their request.
pub const RING: &str = "ring-ref";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Model {
    LinuxBlkback,
    LinuxNetback,
    QemuBlock,
    QemuNic,
    Pvio,
}

/// A backend, its connection, and its events that are not delivered.
pub struct Backend {
    pub xs: LocalClient,
    model: Model,
    back: String,
    front: String,
    state: S,
    pvio: BackendDriver<Offer>,
}

/// The class for pvio's driver.
struct Offer;

impl BackendClass for Offer {
    fn prepare(&mut self, _: &mut dyn Xenstore, _: &BackendContext) -> Result<Prepared, Fault> {
        Ok(Prepared::Yes)
    }

    fn offer(&self, _: &mut dyn Xenstore, _: &BackendContext) -> Result<(), HandshakeError> {
        Ok(())
    }

    fn connect(
        &mut self,
        xs: &mut dyn Xenstore,
        context: &BackendContext,
    ) -> Result<std::task::Poll<()>, Fault> {
        match xs.read_opt(&format!("{}/{RING}", context.front))? {
            Some(_) => Ok(std::task::Poll::Ready(())),
            None => Err(Fault::new("test", "there is no ring")),
        }
    }

    fn describe(&self, _: &mut dyn Xenstore, _: &BackendContext) -> Result<(), HandshakeError> {
        Ok(())
    }

    fn disconnect(&mut self) -> std::task::Poll<()> {
        std::task::Poll::Ready(())
    }

    fn fault(&mut self) -> Option<Fault> {
        None
    }
}

impl Backend {
    /// Returns a backend that starts: it writes its offer, and reads the frontend's state.
    pub fn start(model: Model, xs: LocalClient, addr: DeviceAddr, back: &str) -> Self {
        let pvio = BackendDriver::new(addr, Offer);
        Self::with(model, xs, addr, back, pvio, S::Initialising)
    }

    /// Returns a backend with a session whose frontend died.
    pub fn connected(model: Model, xs: LocalClient, addr: DeviceAddr, back: &str) -> Self {
        let pvio = BackendDriver::resuming(addr, Offer);
        let mut this = Self::with(model, xs, addr, back, pvio, S::Initialising);
        this.set(S::Connected);
        this
    }

    /// Returns pvio's backend after its process died: the session of its predecessor is lost.
    pub fn restarted(xs: LocalClient, addr: DeviceAddr, back: &str) -> Self {
        let pvio = BackendDriver::restarted(addr, Offer);
        Self::with(Model::Pvio, xs, addr, back, pvio, S::Initialising)
    }

    fn with(
        model: Model,
        mut xs: LocalClient,
        addr: DeviceAddr,
        back: &str,
        pvio: BackendDriver<Offer>,
        state: S,
    ) -> Self {
        let (back, front) = (back.to_owned(), addr.frontend_path());
        if model != Model::Pvio {
            xs.watch(&state_path(&front), "front").unwrap();
        }
        let mut this = Self { xs, model, back, front, state, pvio };
        match model {
            Model::Pvio => this.react(),
            _ => this.set(S::InitWait),
        }
        this
    }

    pub fn model(&self) -> Model {
        self.model
    }

    pub fn state(&self) -> S {
        self.state
    }

    /// Handles one event, if there is one, with the frontend's current state.
    pub fn event(&mut self) -> bool {
        let came = self.xs.poll_event().unwrap().is_some();
        if came {
            self.react();
        }
        came
    }

    fn react(&mut self) {
        if self.model == Model::Pvio {
            self.pvio.step(&mut self.xs).unwrap();
            self.state = self.pvio.state();
            return;
        }
        let front = read_state(&mut self.xs, &self.front).unwrap();
        match self.model {
            Model::LinuxBlkback => self.blkback(front),
            Model::LinuxNetback => self.netback(front),
            Model::QemuBlock | Model::QemuNic => self.qemu(front),
            Model::Pvio => {}
        }
    }

    fn blkback(&mut self, front: S) {
        match front {
            S::Initialising if self.state == S::Closed => self.set(S::InitWait),
            S::Initialising => {}
            S::Initialised | S::Connected if self.state == S::Connected => {}
            S::Initialised | S::Connected => self.connect(),
            S::Closing => self.set(S::Closing),
            S::Closed => self.set(S::Closed),
            // Fatal to the device.
            _ => self.set(S::Closing),
        }
    }

    fn netback(&mut self, front: S) {
        let to = match front {
            S::Initialising => S::InitWait,
            S::Connected => S::Connected,
            S::Closing => S::Closing,
            S::Closed | S::Unknown => S::Closed,
            _ => return,
        };
        while self.state != to {
            match (self.state, to) {
                (S::Closed, S::Closing) => self.set(S::Closing),
                (S::Closed, _) => self.set(S::InitWait),
                (S::InitWait, S::Connected) => return self.connect(),
                (S::InitWait | S::Connected, _) => self.set(S::Closing),
                (S::Closing, _) => self.set(S::Closed),
                (from, to) => panic!("no netback transition from {from} to {to}"),
            }
        }
    }

    fn qemu(&mut self, front: S) {
        match front {
            S::Initialising if self.state == S::Closed => self.set(S::InitWait),
            S::Initialised if self.model == Model::QemuNic => {}
            S::Initialised | S::Connected if self.state == S::Connected => {}
            S::Initialised | S::Connected => self.connect(),
            S::Closing => self.set(S::Closing),
            S::Closed | S::Unknown => self.set(S::Closed),
            _ => {}
        }
    }

    /// Connects to the frontend's ring; a frontend with a request has one.
    fn connect(&mut self) {
        if self.xs.read_opt(&format!("{}/{RING}", self.front)).unwrap().is_none() {
            return self.set(S::Closing);
        }
        self.set(S::Connected);
    }

    fn set(&mut self, state: XenbusState) {
        if self.state != state {
            self.state = state;
            write_state(&mut self.xs, &self.back, state).unwrap();
        }
    }
}
