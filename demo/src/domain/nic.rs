//! A NIC attached through the frontend driver, as the guest's TCP stack uses it.

use super::watcher::name_of;
use crate::guest::status::Devices;
use pvio_daemon::failure::Failure;
use pvio_daemon::stop::{Stop, Wakeup, sleep};
use pvio_event_channel::EventChannel;
use pvio_hosted::Domain;
use pvio_netfront::{BackendFault, Nic};
use pvio_runtime::Spin;
use pvio_xenbus::client::Client;
use pvio_xenbus::driver::{Fault, FrontendDriver, Life};
use pvio_xenbus::handshake::common::{DeviceAddr, read_error};
use pvio_xenbus::{XenbusState, Xenstore, XsError};
use smoltcp::phy::{Device, DeviceCapabilities};
use smoltcp::time::Instant as StackInstant;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

/// How long to wait for the backend to close when the guest closes its NIC.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long to wait, before that, for the backend to unmap the staging grants.
const UNSTAGE_TIMEOUT: Duration = Duration::from_millis(250);
/// Number of turns without a sleep after which xenstore is polled, which costs a system call.
const MAX_BUSY_TURNS: u32 = 64;

/// The NIC with its driver.
pub struct AttachedNic {
    driver: FrontendDriver<Nic<Domain>>,
    xs: Client,
    spin: Spin,
    turns: u32,
    devices: Devices,
    sessions: u32,
}

impl std::fmt::Debug for AttachedNic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AttachedNic({:?})", self.driver.class())
    }
}

fn hypervisor_lost(e: XsError) -> Failure {
    Failure::of(e).context("the connection to the hypervisor was lost")
}

impl AttachedNic {
    /// Attaches the NIC as soon as its backend is ready, and updates `devices` with the number of
    /// sessions. Without a backend, waits until a stop is requested, which signals `wakeup`.
    ///
    /// # Errors
    /// The backend cannot serve the NIC.
    /// When the backend cannot serve it.
    pub fn attach(
        domain: &Domain,
        addr: DeviceAddr,
        devices: Devices,
        stop: &Stop,
        wakeup: &Wakeup,
    ) -> Result<Self, Failure> {
        let xs = domain.xenstore().map_err(Failure::of)?;
        // The stack uses IPv4 and joins no multicast group, so the backend can filter multicast
        // frames.
        let nic = Nic::new(domain.clone()).choosing_groups();
        let driver = FrontendDriver::new(addr, nic);
        let mut nic = Self { driver, xs, spin: Spin::default(), turns: 0, devices, sessions: 0 };
        nic.driver.step(&mut nic.xs).map_err(hypervisor_lost)?;
        while !nic.driver.class().is_connected() && !stop.is_requested() {
            nic.process_events()?;
            if !nic.driver.class().is_connected() {
                sleep(&[nic.xs.as_fd(), wakeup.as_fd()], None)?;
                wakeup.take();
            }
        }
        Ok(nic)
    }

    /// Returns the MAC address that the toolstack configured.
    #[must_use]
    pub fn mac(&self) -> Option<[u8; 6]> {
        self.driver.class().mac().map(|mac| mac.0)
    }

    /// Publishes submitted requests, then sleeps until there is a packet, a free slot, an event of
    /// xenstore, the wakeup, or the timeout. With a timeout of zero, only publishes.
    ///
    /// # Errors
    /// The NIC is closed, or the connection to the hypervisor is lost.
    pub fn wait(&mut self, wakeup: &Wakeup, time: Option<Duration>) -> Result<(), Failure> {
        self.checked(|queue| queue.publish())?;
        self.turns += 1;
        let is_busy = time == Some(Duration::ZERO);
        if is_busy && self.turns < MAX_BUSY_TURNS {
            return Ok(());
        }
        self.turns = 0;
        self.process_events()?;
        if self.driver.class().has_news() {
            self.driver.step(&mut self.xs).map_err(hypervisor_lost)?;
        }
        if is_busy {
            return Ok(());
        }
        let mut spin = std::mem::take(&mut self.spin);
        let found = self.checked(|queue| {
            let mut check = || Ok::<_, BackendFault>(wakeup.is_pending() || queue.has_work()?);
            Ok(spin.until(&mut check)? || queue.final_check()?)
        });
        self.spin = spin;
        if found?.unwrap_or(wakeup.is_pending()) {
            if wakeup.is_pending() {
                wakeup.take();
            }
            return Ok(());
        }
        self.spin.sleeping();
        let channel = self.driver.class_mut().queue().map(|queue| queue.channel());
        let mut fds: Vec<BorrowedFd<'_>> = vec![self.xs.as_fd(), wakeup.as_fd()];
        fds.extend(channel.map(AsFd::as_fd));
        sleep(&fds, time)?;
        if let Some(channel) = channel {
            // Only clears the notification; the rings are checked in any case.
            let _ = channel.take();
        }
        wakeup.take();
        self.process_events()
    }

    /// Closes the NIC and waits for the backend to close.
    pub fn close(mut self) {
        self.unstage();
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        if let Err(e) = self.driver.close(&mut self.xs) {
            return tracing::warn!(error = %e, "the NIC cannot be closed");
        }
        while self.driver.state() != XenbusState::Closed && Instant::now() < deadline {
            let remaining = deadline.saturating_duration_since(Instant::now());
            if self.process_events().is_err() || self.driver.state() == XenbusState::Closed {
                return;
            }
            if sleep(&[self.xs.as_fd()], Some(remaining)).is_err() {
                return;
            }
        }
    }

    /// Requests that the backend unmaps the staging grants. A backend that does not do so in time
    /// keeps them mapped until it closes.
    fn unstage(&mut self) {
        let nic = self.driver.class_mut();
        nic.unstage();
        let deadline = Instant::now() + UNSTAGE_TIMEOUT;
        // Requests are only processed while the queues are polled. Packets received now are
        // discarded.
        while !nic.queues().is_empty() && !nic.is_settled() {
            if let Some(queue) = nic.queue() {
                let _ = queue.receive(|_, _| ()).and_then(|_| queue.publish());
            }
            let remaining = deadline.saturating_duration_since(Instant::now());
            let found = nic.final_check();
            if remaining.is_zero() || found.is_err() {
                break;
            }
            if found == Ok(true) {
                continue;
            }
            let channels: Vec<BorrowedFd<'_>> = nic.channels().map(AsFd::as_fd).collect();
            if sleep(&channels, Some(remaining)).is_err() {
                break;
            }
            for channel in nic.channels() {
                // Only clears the notification; the rings are checked in any case.
                let _ = channel.take();
            }
        }
        let (still_mapped, refused) = (nic.staged(), nic.not_unstaged());
        if still_mapped != 0 || refused != 0 {
            tracing::info!(still_mapped, refused, "the backend has not unmapped every staged page");
        }
    }

    /// Calls `work` with the queue, if there is one; closes the NIC if the backend violated the
    /// protocol.
    fn checked<T>(
        &mut self,
        work: impl FnOnce(&mut pvio_netfront::Queue<Domain>) -> Result<T, BackendFault>,
    ) -> Result<Option<T>, Failure> {
        let Some(queue) = self.driver.class_mut().queue() else { return Ok(None) };
        match work(queue) {
            Ok(done) => Ok(Some(done)),
            Err(fault) => {
                let fault_node = Fault::of(fault.code(), &fault);
                self.driver.fail(&mut self.xs, &fault_node).map_err(hypervisor_lost)?;
                Err(Failure::of(fault).context("the NIC was closed"))
            }
        }
    }

    /// Steps the driver as long as there are events of xenstore.
    fn process_events(&mut self) -> Result<(), Failure> {
        loop {
            let mut has_events = false;
            while let Some(event) = self.xs.poll_event().map_err(hypervisor_lost)? {
                has_events |= event.token == self.driver.token();
            }
            if !has_events {
                return Ok(());
            }
            let life = self.driver.step(&mut self.xs).map_err(hypervisor_lost)?;
            if life == Life::Gone {
                return Err(Failure::new("the NIC was removed", ""));
            }
            if self.driver.is_closing() && self.driver.state() == XenbusState::Closed {
                return Err(self.closed());
            }
            let sessions = self.driver.class().sessions();
            if sessions != self.sessions {
                self.sessions = sessions;
                self.devices.set_sessions(&name_of(self.driver.addr()), sessions);
            }
        }
    }

    /// Returns the failure with the message that backend or frontend wrote to xenstore.
    fn closed(&mut self) -> Failure {
        let paths = [self.driver.backend_path(), Some(self.driver.token())];
        let xs = &mut self.xs;
        let why = paths.into_iter().flatten().find_map(|path| read_error(xs, path).ok().flatten());
        Failure::new(why.unwrap_or_else(|| "the NIC was closed by its backend".into()), "")
    }
}

impl Device for AttachedNic {
    type RxToken<'a> = <Nic<Domain> as Device>::RxToken<'a>;
    type TxToken<'a> = <Nic<Domain> as Device>::TxToken<'a>;

    fn receive(&mut self, now: StackInstant) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        self.driver.class_mut().receive(now)
    }

    fn transmit(&mut self, now: StackInstant) -> Option<Self::TxToken<'_>> {
        self.driver.class_mut().transmit(now)
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.driver.class().capabilities()
    }
}
