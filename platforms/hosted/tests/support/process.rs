//! Domains and devices in separate processes: this test program is started again and executes commands that it
//! reads line by line.

use super::{LOST, flood, lockstep};
use pvio_event_channel::{DeviceDescriptors, DevicePlatform, EventChannel, EventChannels, Port};
use pvio_grant_table::{Access, DomId, GrantMapper, GrantRef, Granter};
use pvio_hosted::{Channel, DeviceDescription, Domain, Hypervisor, Mapping, Pages};
use pvio_ring::shm::{Region, SharedMemory};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// Process that has joined as a domain, or that embeds a hypervisor.
pub struct Process {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Process {
    /// Starts a process that joins as domain `id`.
    pub fn domain(dir: &Path, id: DomId) -> Self {
        Self::start("--domain", dir, id.0)
    }

    /// Starts a process that starts a hypervisor. Also returns the process's reply with the result.
    pub fn hypervisor(dir: &Path) -> (Self, String) {
        let mut process = Self::start("--hypervisor", dir, 0);
        let answer = process.answer();
        (process, answer)
    }

    /// Starts a device process, whose descriptor is its standard error.
    pub fn device(descriptors: DeviceDescriptors<DeviceDescription>) -> Self {
        let DeviceDescriptors { description, fds } = descriptors;
        let [socket] = fds.try_into().unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--device", &serde_json::to_string(&description).unwrap(), "0"]);
        Self::spawn(command.stderr(socket))
    }

    fn start(what: &str, dir: &Path, id: u16) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        Self::spawn(command.arg(what).arg(dir).arg(id.to_string()))
    }

    fn spawn(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (orders, answers) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Self { child, orders, answers: BufReader::new(answers) }
    }

    /// Sends a command and waits for the reply.
    pub fn ask(&mut self, order: impl AsRef<str>) -> String {
        self.tell(order);
        self.answer()
    }

    /// Sends a command.
    pub fn tell(&mut self, order: impl AsRef<str>) {
        writeln!(self.orders, "{}", order.as_ref()).unwrap();
    }

    /// Waits for the reply to a command.
    pub fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        assert!(line.ends_with('\n'), "the process ended");
        line.trim_end().to_owned()
    }

    /// Kills the process with a signal that it cannot handle.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// If this process was started by [`Process`], executes its commands and returns `true`.
pub fn serve() -> bool {
    let args: Vec<String> = std::env::args().collect();
    let [_, what, dir, id] = args.as_slice() else { return false };
    let dir = Path::new(dir);
    match what.as_str() {
        "--domain" => {
            let domain = Domain::join(dir, DomId(id.parse().unwrap())).unwrap();
            Told::new(domain).obey_all();
        }
        "--device" => {
            // Standard error is the socket.
            std::panic::set_hook(Box::new(|panic| println!("{panic}")));
            let description = serde_json::from_str(dir.to_str().unwrap()).unwrap();
            let fds = vec![std::io::stderr().as_fd().try_clone_to_owned().unwrap()];
            let domain = Domain::from_descriptors(DeviceDescriptors { description, fds }).unwrap();
            Told::new(domain).obey_all();
        }
        "--hypervisor" => {
            let started = Hypervisor::start(dir);
            println!("{}", started.as_ref().map_or_else(|why| why.code(), |_| "running"));
            std::io::stdin().lines().for_each(drop);
        }
        _ => return false,
    }
    true
}

struct Told {
    domain: Domain,
    pages: Option<Pages>,
    mapping: Option<Mapping>,
    bell: Option<Channel>,
}

impl Told {
    fn new(domain: Domain) -> Self {
        Self { domain, pages: None, mapping: None, bell: None }
    }

    fn obey_all(&mut self) {
        for line in std::io::stdin().lines() {
            println!("{}", self.obey(&line.unwrap()));
        }
    }

    fn obey(&mut self, order: &str) -> String {
        let words: Vec<&str> = order.split(' ').collect();
        let number = |word: &str| word.parse::<u32>().unwrap();
        let domid = |word: &str| DomId(word.parse().unwrap());
        match *words.as_slice() {
            ["alloc", pages] => {
                self.pages = Some(self.domain.alloc_pages(number(pages) as usize).unwrap());
            }
            ["grant", peer, page, how] => {
                let (pages, page) = (self.pages.as_ref().unwrap(), number(page) as usize);
                let gref = self.domain.grant(domid(peer), pages, page, access(how)).unwrap();
                return gref.to_string();
            }
            ["end", gref] => {
                if self.domain.end_access(GrantRef(number(gref))).is_err() {
                    return "busy".into();
                }
            }
            ["map", peer, how, ref grefs @ ..] => {
                let grefs: Vec<_> = grefs.iter().map(|gref| GrantRef(number(gref))).collect();
                match self.domain.map(domid(peer), &grefs, access(how)) {
                    Ok(mapping) => self.mapping = Some(mapping),
                    Err(status) => return status.code().into(),
                }
            }
            // A root directory without any file, and another user.
            ["confine", dir] => {
                rustix::process::chroot(dir).unwrap();
                std::env::set_current_dir("/").unwrap();
                let nobody = rustix::process::Uid::from_raw(65534);
                rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
                let opened = std::fs::read_dir("/").map(Iterator::count);
                assert!(matches!(opened, Ok(0) | Err(_)), "{opened:?}");
            }
            ["unmap"] => self.mapping = None,
            ["write", at, text] => {
                let done = match (&self.mapping, &self.pages) {
                    (Some(mapping), _) => mapping.write_bytes(number(at) as usize, text.as_bytes()),
                    (_, pages) => {
                        pages.as_ref().unwrap().write_bytes(number(at) as usize, text.as_bytes())
                    }
                };
                done.unwrap();
            }
            ["read", at, len] => {
                let mut text = vec![0; number(len) as usize];
                match (&self.mapping, &self.pages) {
                    (Some(mapping), _) => mapping.read_bytes(number(at) as usize, &mut text),
                    (_, pages) => {
                        pages.as_ref().unwrap().read_bytes(number(at) as usize, &mut text)
                    }
                }
                .unwrap();
                return String::from_utf8(text).unwrap();
            }
            ["listen", peer] => {
                let bell = self.domain.alloc_unbound(domid(peer)).unwrap();
                let port = bell.port().to_string();
                self.bell = Some(bell);
                return port;
            }
            ["bind", peer, port] => {
                let bound = self.domain.bind_interdomain(domid(peer), Port(number(port)));
                match bound {
                    Ok(bell) => self.bell = Some(bell),
                    Err(why) => return why.code().into(),
                }
            }
            ["notify"] => self.bell.as_ref().unwrap().notify().unwrap(),
            ["wait"] => assert!(self.bell.as_ref().unwrap().wait(Some(LOST)).unwrap()),
            [game @ ("lockstep" | "flood"), who, turns] => match (&self.mapping, &self.pages) {
                (Some(mapping), _) => self.play(mapping, game, who, number(turns)),
                (_, pages) => self.play(pages.as_ref().unwrap(), game, who, number(turns)),
            },
            // Maps and unmaps until the process is killed; replies once, at the start.
            ["storm", peer, gref] => {
                let gref = [GrantRef(number(gref))];
                println!("done");
                loop {
                    drop(self.domain.map(domid(peer), &gref, Access::ReadWrite).unwrap());
                }
            }
            _ => panic!("what is {order:?}?"),
        }
        "done".into()
    }

    fn play(&self, page: &impl SharedMemory, game: &str, who: &str, turns: u32) {
        let (bell, first) = (self.bell.as_ref().unwrap(), who == "first");
        match game {
            "flood" => flood(page, bell, first, turns),
            _ => lockstep(page, bell, first, turns),
        }
    }
}

fn access(how: &str) -> Access {
    if how == "rw" { Access::ReadWrite } else { Access::ReadOnly }
}
