//! Hypervisor and toolstack: makes domains and devices, runs a process for each domain, and takes
//! everything down again.
//!
//! | module | holds |
//! |---|---|
//! | [`home`] | the state directory |
//! | [`devices`] | devices in xenstore, and a backend's half made anew |
//! | [`child`] | a child process: what it says, how it ends |
//! | [`rights`] | the right to make a tap, or a network namespace of our own |
//!
//! The order of things: hypervisor, domains, devices, driver domain, guest; ready when the guest
//! says so. Down: guest, driver domain, hypervisor. A driver domain that dies is started again
//! under its number, and the guest's frontends attach to it anew; a guest that dies ends it all.

pub mod child;
pub mod devices;
pub mod home;
pub mod rights;

use crate::domain::Said;
use child::{Child, Role};
use crossbeam_channel::{Receiver, Sender, unbounded};
use devices::{DiskConfig, NicConfig};
use home::Home;
use pvio_daemon::disks::HOSTED_DRIVER;
use pvio_daemon::failure::Failure;
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
/// How long everything may take until it works, at first or again.
const START: Duration = Duration::from_secs(30);
/// How often devices are looked at until they work.
const LOOK: Duration = Duration::from_millis(100);
/// How long a child may take to end when it is asked to.
const END: Duration = Duration::from_secs(5);
/// How long the kernel may take to let go of what a killed driver domain had open.
const RELEASE: Duration = Duration::from_secs(3);
/// So many restarts of the driver domain within [`RESTARTS_TIME`] are too many.
const RESTARTS: usize = 5;
const RESTARTS_TIME: Duration = Duration::from_secs(60);
/// Pages the guest can share: a NIC takes some thousand, a disk some hundred. They take memory only once
/// they are used.
const GUEST_PAGES: u32 = 65_536;
/// Frames of its grant table, all there can be: place for about 90 disks.
const GUEST_GRANT_FRAMES: u32 = 64;

/// What is to run.
#[derive(Debug)]
pub struct Plan {
    /// The guest's name.
    pub name: String,
    /// Its disk.
    pub disk: DiskConfig,
    /// Its NIC.
    pub nic: Option<NicConfig>,
    /// The hidden command the guest runs, and what it is told beside where to join.
    pub guest: (&'static str, Vec<OsString>),
    /// The guest may write to this terminal.
    pub guest_on_terminal: bool,
}

/// What happens.
#[derive(Debug)]
pub enum Event {
    /// The user wants it to end.
    Signal,
    /// A child says something.
    Said(Role, Said),
    /// A child ended; with the number of its start.
    Ended(Role, u32, Option<ExitStatus>),
}

/// What the caller is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// The guest works.
    Ready,
    /// The driver domain died, in these words, and was started again.
    DriverRestarted(String),
    /// The guest's report.
    Report(String),
    /// The guest ended by itself, all well.
    Done,
    /// The guest has something to tell the user.
    Note(String),
    /// The user wants it to end.
    Stopped,
}

/// Everything that runs. Dropping it takes all down, at once if need be; better
/// [`Machine::shut_down`].
pub struct Machine {
    // In the order of their end.
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
    /// Until then the devices have to work; none if they do.
    probation: Option<Instant>,
    /// The guest was ready once.
    is_ready: bool,
}

impl Machine {
    /// Starts everything.
    ///
    /// # Errors
    /// A [`Failure`]; nothing is left running then.
    pub fn start(plan: Plan, home: Home, hypervisor: Hypervisor) -> Result<Self, Failure> {
        let (sender, events) = unbounded();
        listen_for_signals(&home, sender.clone())?;
        let driver = DomainConfig::new("driver-domain").id(DRIVER);
        hypervisor.create_domain(driver).map_err(|e| domain_failure(&e))?;
        let guest = DomainConfig::new(&plan.name).id(GUEST);
        let guest = guest.memory_pages(GUEST_PAGES).grant_frames(GUEST_GRANT_FRAMES);
        hypervisor.create_domain(guest).map_err(|e| domain_failure(&e))?;
        let mut xs = hypervisor.xenstore().map_err(Failure::of)?;
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
            probation: Some(Instant::now() + START),
            is_ready: false,
        };
        machine.start_driver(false)?;
        machine.start_guest()?;
        Ok(machine)
    }

    /// The state directory.
    #[must_use]
    pub const fn home(&self) -> &Home {
        &self.home
    }

    /// Waits until there is something to tell.
    ///
    /// # Errors
    /// A [`Failure`] that ends it all: shut down then.
    pub fn next_news(&mut self) -> Result<News, Failure> {
        loop {
            let event = match self.probation {
                Some(by) => match self.events.recv_timeout(LOOK) {
                    Ok(event) => event,
                    Err(_) => {
                        self.look(by)?;
                        continue;
                    }
                },
                // We hold a sender ourselves, so it is never closed.
                None => self.events.recv().map_err(Failure::of)?,
            };
            match event {
                Event::Signal => return Ok(News::Stopped),
                Event::Said(Role::Guest, Said::Ready) => {
                    (self.probation, self.is_ready) = (None, true);
                    return Ok(News::Ready);
                }
                Event::Said(Role::Guest, Said::Report(json)) => return Ok(News::Report(json)),
                Event::Said(role, Said::Failed(failure)) => return Err(self.reason(role, failure)),
                Event::Said(Role::Guest, Said::Note(text)) => return Ok(News::Note(text)),
                Event::Said(Role::Driver, _) => {}
                Event::Ended(role, start, status) => {
                    if let Some(news) = self.ended(role, start, status)? {
                        return Ok(news);
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
    ) -> Result<Option<News>, Failure> {
        let child = match role {
            Role::Driver => &mut self.driver,
            Role::Guest => &mut self.guest,
        };
        if child.as_ref().is_none_or(|c| c.start() != start) {
            return Ok(None);
        }
        *child = None;
        let how = child::how_it_ended(status);
        match role {
            Role::Guest if status.is_some_and(|s| s.success()) => Ok(Some(News::Done)),
            Role::Guest => {
                self.home.keep();
                Err(Failure::new(
                    format!("the guest ended unexpectedly ({how}); everything else was taken down"),
                    format!("its log is {}", self.log(self.plan.guest.0)),
                ))
            }
            Role::Driver => {
                let now = Instant::now();
                self.restarts.retain(|at| now - *at < RESTARTS_TIME);
                if self.restarts.len() >= RESTARTS {
                    self.home.keep();
                    return Err(Failure::new(
                        format!(
                            "the driver domain ended {} times within a minute, now {how}",
                            RESTARTS + 1
                        ),
                        format!("its log is {}", self.log("driver")),
                    ));
                }
                self.restarts.push_back(now);
                self.start_driver(true)?;
                self.probation = Some(Instant::now() + START);
                Ok(Some(News::DriverRestarted(how)))
            }
        }
    }

    /// A guest whose device was closed may not read why: that stands in its backend's home.
    fn reason(&mut self, role: Role, failure: Failure) -> Failure {
        match devices::backend_error(&mut self.xs) {
            Some(text) if role == Role::Guest => {
                Failure { code: failure.code, ..Failure::of(text) }
            }
            _ => failure,
        }
    }

    fn log(&self, of: &str) -> String {
        self.home.path().join(format!("{of}.log")).display().to_string()
    }

    /// Whether devices that have to work by then do, or never will.
    fn look(&mut self, by: Instant) -> Result<(), Failure> {
        if let Some(why) = devices::backend_error(&mut self.xs) {
            return Err(Failure::of(why));
        }
        let nic = self.plan.nic.is_some();
        if self.is_ready && devices::are_connected(&mut self.xs, nic) {
            self.probation = None;
        } else if Instant::now() >= by {
            self.home.keep();
            let what = if self.is_ready {
                "the devices did not come back"
            } else {
                "the guest was not ready"
            };
            return Err(Failure::new(
                format!("{what} within {} seconds", START.as_secs()),
                format!("the logs in {} say how far it came", self.home.path().display()),
            ));
        }
        Ok(())
    }

    fn start_driver(&mut self, again: bool) -> Result<(), Failure> {
        if again {
            self.plan.disk.until_free(RELEASE);
            if let Some(nic) = &self.plan.nic {
                nic.until_free(RELEASE);
            }
            // The process and its domain are one; what the hypervisor has not noticed yet, it does now.
            match self.hypervisor.destroy_domain(DRIVER) {
                Ok(()) | Err(DomainError::NoDomain(_)) => {}
                Err(e) => return Err(domain_failure(&e)),
            }
            let driver = DomainConfig::new("driver-domain").id(DRIVER);
            self.hypervisor.create_domain(driver).map_err(|e| domain_failure(&e))?;
            devices::create_backends_again(&mut self.xs, &self.plan.disk, self.plan.nic.as_ref())
                .map_err(Failure::of)?;
            devices::until_frontends_know(&mut self.xs, self.plan.nic.is_some(), RELEASE);
        }
        let mut args: Vec<OsString> = Vec::new();
        if let Some((address, prefix)) = self.plan.nic.as_ref().and_then(|nic| nic.host) {
            args.extend(["--host-ip".into(), format!("{address}/{prefix}").into()]);
        }
        if let Some(words) = self.plan.nic.as_ref().map(|nic| &nic.words) {
            args.push(format!("--nic-options={}", words.options).into());
            args.extend(words.uplinks.iter().map(|link| format!("--nic-uplink={link}").into()));
            args.extend(words.shares.iter().map(|share| format!("--nic-share={share}").into()));
        }
        self.driver = Some(self.spawn(Role::Driver, "driver", &args, false)?);
        Ok(())
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

    /// Takes everything down in order: the guest closes its devices, the driver domain its ends of
    /// them, then the hypervisor goes.
    pub fn shut_down(mut self) {
        let children = [self.guest.take(), self.driver.take()];
        for mut child in children.into_iter().flatten() {
            child.ask_to_end();
            let by = Instant::now() + END;
            while let Ok(event) = self.events.recv_deadline(by) {
                if matches!(event, Event::Ended(role, start, _) if role == child.role() && start == child.start())
                {
                    child.forget();
                    break;
                }
            }
            // Dropped: killed, if it is there still.
        }
    }
}

/// The first signal is an event; the second ends it at once.
fn listen_for_signals(home: &Home, sender: Sender<Event>) -> Result<(), Failure> {
    let mut told = false;
    let sweep = home.sweep();
    signals::listen(move || {
        if std::mem::replace(&mut told, true) {
            // The children die with this process, and their taps with them.
            sweep.now(true);
            std::process::exit(130);
        }
        let _ = sender.send(Event::Signal);
    })
}

fn domain_failure(e: &DomainError) -> Failure {
    match e {
        DomainError::NameInUse(name) => Failure::input(
            format!("the name {name:?} is in use already"),
            "choose another with --name",
        ),
        other => Failure::of(other).as_input(),
    }
}
