//! Hypervisor and toolstack: creates domains and devices, runs a process for each domain, and stops
//! everything.
//!
//! | module | contents |
//! |---|---|
//! | [`home`] | the state directory |
//! | [`devices`] | devices in xenstore, and backend nodes that are created again |
//! | [`child`] | a child process: its messages and its end |
//! | [`rights`] | the permission to create a tap, or a new network namespace |
//!
//! Order of start: hypervisor, domains, devices, driver domain, guest; the machine is ready when
//! the guest reports it. Order of stop: guest, driver domain, hypervisor. If the driver domain
//! ends, it is started again under its number, and the guest's frontends reconnect. If the guest
//! ends, everything is stopped.

pub mod child;
pub mod devices;
pub mod home;
pub mod rights;

use crate::domain::ChildMessage;
use child::{Child, Role};
use crossbeam_channel::{Receiver, Sender, unbounded};
use devices::{DiskConfig, NicConfig};
use home::Home;
use pvio_daemon::disks::HOSTED_DRIVER;
use pvio_daemon::failure::Failure;
use pvio_daemon::isolation::IsolationArgs;
use pvio_daemon::signals;
use pvio_grant_table::DomId;
use pvio_hosted::{DomainConfig, DomainError, Hypervisor};
use pvio_xenbus::client::Client;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

/// The driver domain's number.
pub const DRIVER: DomId = HOSTED_DRIVER;
/// The guest's number.
pub const GUEST: DomId = DomId(2);
/// How long to wait until all devices are connected, after a start or restart.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Interval at which the devices are polled until they are connected.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// How long to wait for a child to end after SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for the kernel to close the files of a killed driver domain.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(3);
/// Maximum number of restarts of the driver domain within [`RESTARTS_TIME`].
const RESTARTS: usize = 5;
const RESTARTS_TIME: Duration = Duration::from_secs(60);
/// Number of pages that the guest can share: a NIC needs some thousand, a disk some hundred. Memory
/// is only allocated on first use.
const GUEST_PAGES: u32 = 65_536;
/// Number of frames of its grant table, which is the maximum: enough for about 90 disks.
const GUEST_GRANT_FRAMES: u32 = 64;

/// Configuration of a machine.
#[derive(Debug)]
pub struct Plan {
    /// The guest's name.
    pub name: String,
    /// Its disk.
    pub disk: DiskConfig,
    /// Its NIC.
    pub nic: Option<NicConfig>,
    /// The hidden command that the guest runs, and its own arguments.
    pub guest: (&'static str, Vec<OsString>),
    /// The guest's standard error is the terminal.
    pub guest_on_terminal: bool,
    /// Where devices are served.
    pub isolation: IsolationArgs,
}

/// An event that the machine handles.
#[derive(Debug)]
pub enum Event {
    /// A signal requests a stop.
    Signal,
    /// A message of a child.
    Message(Role, ChildMessage),
    /// A child ended; with the sequence number of its start.
    Ended(Role, u32, Option<ExitStatus>),
}

/// An event that is reported to the caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest is ready.
    Ready,
    /// The driver domain ended, with this status, and was started again.
    DriverRestarted(String),
    /// The guest's report.
    Report(String),
    /// The guest exited without an error.
    Done,
    /// A notice of the guest for the user.
    Note(String),
    /// A signal requested a stop.
    Stopped,
}

/// A running machine. Dropping it kills the children; [`Machine::shut_down`] stops them in order.
pub struct Machine {
    // Fields are dropped in this order.
    guest: Option<Child>,
    driver: Option<Child>,
    hypervisor: Hypervisor,
    xs: Client,
    home: Home,
    plan: Plan,
    events: Receiver<Event>,
    sender: Sender<Event>,
    restarts: VecDeque<Instant>,
    starts: u32,
    /// Deadline for the devices to be connected; `None` once they are.
    connect_deadline: Option<Instant>,
    /// The guest has reported that it is ready.
    is_ready: bool,
}

impl Machine {
    /// Starts the machine.
    ///
    /// # Errors
    /// A [`Failure`]; everything that was started has been stopped.
    pub fn start(plan: Plan, home: Home, hypervisor: Hypervisor) -> Result<Self, Failure> {
        let (sender, events) = unbounded();
        listen_for_signals(&home, sender.clone())?;
        // A supervisor that ends is followed by another one of the same domain.
        let has_processes = plan.isolation.has_processes();
        let driver = DomainConfig::new("driver-domain").id(DRIVER).rejoinable(has_processes);
        hypervisor.create_domain(driver).map_err(domain_failure)?;
        let guest = DomainConfig::new(&plan.name).id(GUEST);
        let guest = guest.memory_pages(GUEST_PAGES).grant_frames(GUEST_GRANT_FRAMES);
        hypervisor.create_domain(guest).map_err(domain_failure)?;
        let mut xs = hypervisor.xenstore().map_err(Failure::foreign)?;
        devices::create(&mut xs, &plan.disk, plan.nic.as_ref()).map_err(Failure::of)?;
        let mut machine = Self {
            guest: None,
            driver: None,
            hypervisor,
            xs,
            home,
            plan,
            events,
            sender,
            restarts: VecDeque::new(),
            starts: 0,
            connect_deadline: Some(Instant::now() + CONNECT_TIMEOUT),
            is_ready: false,
        };
        machine.start_driver(false)?;
        machine.start_guest()?;
        Ok(machine)
    }

    /// Returns the state directory.
    #[must_use]
    pub const fn home(&self) -> &Home {
        &self.home
    }

    /// Waits for the next event to report.
    ///
    /// # Errors
    /// A [`Failure`] after which the machine has to be shut down.
    pub fn next_event(&mut self) -> Result<MachineEvent, Failure> {
        loop {
            let event = match self.connect_deadline {
                Some(deadline) => match self.events.recv_timeout(POLL_INTERVAL) {
                    Ok(event) => event,
                    Err(_) => {
                        self.check_devices(deadline)?;
                        continue;
                    }
                },
                // `self` has a sender, so the channel is never closed.
                None => self.events.recv().map_err(Failure::foreign)?,
            };
            match event {
                Event::Signal => return Ok(MachineEvent::Stopped),
                Event::Message(Role::Guest, ChildMessage::Ready) => {
                    (self.connect_deadline, self.is_ready) = (None, true);
                    return Ok(MachineEvent::Ready);
                }
                Event::Message(Role::Guest, ChildMessage::Report(json)) => {
                    return Ok(MachineEvent::Report(json));
                }
                Event::Message(role, ChildMessage::Failed(failure)) => {
                    return Err(self.reason(role, failure));
                }
                Event::Message(Role::Guest, ChildMessage::Note(text)) => {
                    return Ok(MachineEvent::Note(text));
                }
                Event::Message(Role::Driver, _) => {}
                Event::Ended(role, start, status) => {
                    if let Some(event) = self.ended(role, start, status)? {
                        return Ok(event);
                    }
                }
            }
        }
    }

    fn ended(
        &mut self,
        role: Role,
        start: u32,
        status: Option<ExitStatus>,
    ) -> Result<Option<MachineEvent>, Failure> {
        let child = match role {
            Role::Driver => &mut self.driver,
            Role::Guest => &mut self.guest,
        };
        if child.as_ref().is_none_or(|c| c.start() != start) {
            return Ok(None);
        }
        *child = None;
        let exit = child::describe_exit(status);
        match role {
            Role::Guest if status.is_some_and(|s| s.success()) => Ok(Some(MachineEvent::Done)),
            Role::Guest => {
                self.home.preserve();
                Err(Failure::new(
                    format!(
                        "the guest ended unexpectedly ({exit}), and all other processes were stopped"
                    ),
                    format!("see its log {}", self.log(self.plan.guest.0)),
                ))
            }
            Role::Driver => {
                let now = Instant::now();
                self.restarts.retain(|at| now - *at < RESTARTS_TIME);
                if self.restarts.len() >= RESTARTS {
                    self.home.preserve();
                    return Err(Failure::new(
                        format!(
                            "the driver domain ended {} times within a minute, now {exit}",
                            RESTARTS + 1
                        ),
                        format!("see its log {}", self.log("driver")),
                    ));
                }
                self.restarts.push_back(now);
                self.start_driver(true)?;
                self.connect_deadline = Some(Instant::now() + CONNECT_TIMEOUT);
                Ok(Some(MachineEvent::DriverRestarted(exit)))
            }
        }
    }

    /// Replaces the guest's failure by the backend's message, which the guest may not be able to
    /// read after its device was closed.
    fn reason(&mut self, role: Role, failure: Failure) -> Failure {
        match devices::backend_error(&mut self.xs) {
            Some(text) if role == Role::Guest => {
                Failure { code: failure.code, ..Failure::new(text, "") }
            }
            _ => failure,
        }
    }

    fn log(&self, of: &str) -> String {
        self.home.path().join(format!("{of}.log")).display().to_string()
    }

    /// Checks the devices until they are connected. Fails if a backend reported an error or the
    /// deadline has passed.
    fn check_devices(&mut self, deadline: Instant) -> Result<(), Failure> {
        if let Some(why) = devices::backend_error(&mut self.xs) {
            return Err(Failure::new(why, ""));
        }
        let nic = self.plan.nic.is_some();
        if self.is_ready && devices::are_connected(&mut self.xs, nic) {
            self.connect_deadline = None;
        } else if Instant::now() >= deadline {
            self.home.preserve();
            let what = if self.is_ready {
                "the devices did not reconnect"
            } else {
                "the guest did not become ready"
            };
            return Err(Failure::new(
                format!("{what} within {} seconds", CONNECT_TIMEOUT.as_secs()),
                format!("see the logs in {}", self.home.path().display()),
            ));
        }
        Ok(())
    }

    fn start_driver(&mut self, again: bool) -> Result<(), Failure> {
        if again && self.plan.isolation.has_processes() {
            // The domain and its backends stay as they are, whether device processes serve or not.
            self.wait_until_left();
            if let Some(nic) = &self.plan.nic {
                nic.wait_until_free(RELEASE_TIMEOUT);
            }
        } else if again {
            self.plan.disk.wait_until_free(RELEASE_TIMEOUT);
            if let Some(nic) = &self.plan.nic {
                nic.wait_until_free(RELEASE_TIMEOUT);
            }
            // Also makes the hypervisor notice the end of the process, if it has not yet.
            match self.hypervisor.destroy_domain(DRIVER) {
                Ok(()) | Err(DomainError::NoDomain(_)) => {}
                Err(e) => return Err(domain_failure(e)),
            }
            let driver = DomainConfig::new("driver-domain").id(DRIVER);
            self.hypervisor.create_domain(driver).map_err(domain_failure)?;
            devices::create_backends_again(&mut self.xs, &self.plan.disk, self.plan.nic.as_ref())
                .map_err(Failure::of)?;
            devices::wait_for_frontends(&mut self.xs, self.plan.nic.is_some(), RELEASE_TIMEOUT);
        }
        let mut args: Vec<OsString> = self.plan.isolation.args();
        if let Some((address, prefix)) = self.plan.nic.as_ref().and_then(|nic| nic.host) {
            args.extend(["--host-ip".into(), format!("{address}/{prefix}").into()]);
        }
        if let Some(nic) = self.plan.nic.as_ref().map(|nic| &nic.nic_args) {
            args.push(format!("--nic-options={}", nic.options).into());
            args.extend(nic.uplinks.iter().map(|link| format!("--nic-uplink={link}").into()));
            args.extend(nic.shares.iter().map(|share| format!("--nic-share={share}").into()));
        }
        self.driver = Some(self.spawn(Role::Driver, "driver", &args, false)?);
        Ok(())
    }

    /// Waits until the hypervisor has noticed the end of the driver domain's supervisor.
    fn wait_until_left(&self) {
        let by = Instant::now() + RELEASE_TIMEOUT;
        let is_joined = || {
            let domains = self.hypervisor.domains();
            domains.iter().any(|domain| domain.id == DRIVER && domain.pid.is_some())
        };
        while is_joined() && Instant::now() < by {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn start_guest(&mut self) -> Result<(), Failure> {
        let (command, args) = (self.plan.guest.0, self.plan.guest.1.clone());
        let child = self.spawn(Role::Guest, command, &args, self.plan.guest_on_terminal)?;
        self.guest = Some(child);
        Ok(())
    }

    fn spawn(
        &mut self,
        role: Role,
        command: &str,
        args: &[OsString],
        on_terminal: bool,
    ) -> Result<Child, Failure> {
        self.starts += 1;
        let domid = if role == Role::Driver { DRIVER } else { GUEST };
        let spawn = child::Spawn { role, command, domid, start: self.starts, args, on_terminal };
        Child::spawn(&spawn, self.home.dir(), self.sender.clone())
    }

    /// Stops everything in order: the guest closes its frontends, the driver domain its backends,
    /// then the hypervisor ends.
    pub fn shut_down(mut self) {
        let children = [self.guest.take(), self.driver.take()];
        for mut child in children.into_iter().flatten() {
            child.terminate();
            let deadline = Instant::now() + STOP_TIMEOUT;
            while let Ok(event) = self.events.recv_deadline(deadline) {
                if matches!(event, Event::Ended(role, start, _) if role == child.role() && start == child.start())
                {
                    child.mark_ended();
                    break;
                }
            }
            // On drop, the child is killed if it has not ended.
        }
    }
}

/// Sends an event for the first signal; exits on the second one.
fn listen_for_signals(home: &Home, sender: Sender<Event>) -> Result<(), Failure> {
    let mut stopping = false;
    let sweep = home.sweep();
    signals::listen(move || {
        if std::mem::replace(&mut stopping, true) {
            // The kernel kills the children when this process exits, and removes their taps.
            sweep.now(true);
            std::process::exit(130);
        }
        let _ = sender.send(Event::Signal);
    })
}

fn domain_failure(e: DomainError) -> Failure {
    match e {
        DomainError::NameInUse(name) => Failure::input(
            format!("a guest named {name:?} cannot be created: the name is in use"),
            "choose another with --name",
        ),
        other => Failure::of(other).as_input(),
    }
}
