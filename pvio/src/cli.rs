//! The command line.

use crate::disks::args::{AttachArgs, DetachArgs, ListArgs, SetArgs};
use crate::failure::Failure;
use clap::{Args, Parser, Subcommand, ValueEnum};
use pvio_blkback::image::{Disk, DiskError, DiskOptions, OptionError};
use pvio_blkback::path::Policy;
use pvio_netback::host::Site;
use pvio_netback::port::options::{NicOptions, shared_rate};
use pvio_netback::port::shape::Share;
use pvio_netback::port::tap::TapConfig;
use pvio_netback::queue::Policy as NicPolicy;
use pvio_xenbus::handshake::common::BackendKind;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;

/// Split-driver paravirtual I/O, wire-compatible with Xen.
#[derive(Debug, Parser)]
#[command(name = "pvio", version, about)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a hypervisor, a driver domain and a guest; the guest serves the disk's files over HTTP
    Run(RunArgs),
    /// Write and read back a verified random workload through the whole path (destroys the image)
    Check(CheckArgs),
    /// Tell what a disk is kept in, and whether it can be served
    Inspect(InspectArgs),
    /// Serve the disks and network interfaces that Xen's toolstack gives to this domain
    Serve(ServeArgs),
    /// Write what passes through a running NIC to a file, for Wireshark and tshark
    Capture(CaptureArgs),
    /// Tell what disks and NICs have done: counters, and why requests and packets were refused
    Stats(StatsArgs),
    /// Give a running guest a disk, on Xen or on a hosted machine
    AttachDisk(Box<AttachArgs>),
    /// Take a disk away from a running guest
    DetachDisk(DetachArgs),
    /// Change a disk that is served: limits, latency, failures
    SetDisk(SetArgs),
    /// List devices: their states, what is behind them, what their ends agreed on
    List(ListArgs),
    /// Make a driver domain's backends again, after it came back under its old number
    Revive(ReviveArgs),
    /// What runs in the child processes
    #[command(hide = true, subcommand)]
    Domain(crate::domain::DomainCommand),
}

/// `pvio run`.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Disk with an ext2/3/4 or FAT file system; a demo image if left out. A path, or
    /// `[OPTIONS]FORMAT:PATH` with any format and option of docs/disks.md
    #[arg(long, value_name = "DISK", value_parser = disk)]
    pub disk: Option<Disk>,
    /// Attach a NIC and serve HTTP over it
    #[arg(long)]
    pub nic: bool,
    #[command(flatten)]
    /// What both commands take.
    pub common: CommonArgs,
    /// The guest's address and its network; the host is the first address of that
    #[arg(long, value_name = "CIDR", default_value = "10.107.0.2/24")]
    pub guest_ip: Cidr,
    /// The guest's MAC address
    #[arg(long, value_name = "MAC", default_value = "00:16:3e:6b:00:02")]
    pub mac: Mac,
    /// Bridge to join, instead of a host address on the tap itself
    #[arg(long, value_name = "NAME")]
    pub bridge: Option<String>,
    /// The tap's name
    #[arg(long, value_name = "NAME", default_value = "pvio0")]
    pub tap: String,
    #[command(flatten)]
    /// What holds for the NIC.
    pub nics: NicArgs,
    /// Bytes of the largest packet, without its Ethernet header
    #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u32).range(576..=9000))]
    pub mtu: u32,
}

/// `pvio inspect`.
#[derive(Debug, Clone, Args)]
pub struct InspectArgs {
    /// A path, or FORMAT:PATH with raw, qcow2, qcow2@SNAPSHOT, vmdk or vhd, or nbd://HOST:PORT/EXPORT,
    /// nbd+unix:///EXPORT?socket=PATH
    #[arg(value_name = "DISK")]
    pub disk: String,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// `pvio check`.
#[derive(Debug, Clone, Args)]
pub struct CheckArgs {
    /// Scratch disk; its contents are destroyed. A path, or `[OPTIONS]FORMAT:PATH` with any format and
    /// option of docs/disks.md
    #[arg(long, value_name = "DISK", value_parser = disk)]
    pub disk: Disk,
    /// Overwrite an image that is not blank
    #[arg(long)]
    pub overwrite: bool,
    /// How long to work, in seconds
    #[arg(long, value_name = "N", default_value_t = 10, conflicts_with = "requests")]
    pub seconds: u64,
    /// Work until that many requests are done
    #[arg(long, value_name = "N")]
    pub requests: Option<u64>,
    /// Requests in flight
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=32))]
    pub depth: u16,
    /// Makes the same workload again
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    /// What both commands take.
    pub common: CommonArgs,
}

/// `pvio serve`.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Kinds of backend to be (vbd, qdisk, pvio-vbd, vif, pvio-vif); all that nobody else serves,
    /// if left out
    #[arg(long, value_name = "KIND", value_delimiter = ',', value_parser = kind)]
    pub kinds: Vec<BackendKind>,
    /// Who attaches devices to what they lead to: the toolstack with its hotplug scripts, as xl does in dom0, or
    /// this daemon itself, as is usual elsewhere
    #[arg(long, value_name = "WHO")]
    pub hotplug: Option<Around>,
    /// What becomes of the devices when the daemon is told to stop
    #[arg(long, value_name = "WHAT", default_value = "close")]
    pub on_stop: OnStop,
    /// How disks reach their guests' pages: map, copy, persistent-or-map or persistent-or-copy
    #[arg(long, value_name = "POLICY", default_value_t = Policy::PersistentOrCopy)]
    pub disk_policy: Policy,
    /// How NICs reach their guests' pages: copy or map
    #[arg(long, value_name = "POLICY", default_value_t = NicPolicy::Copy)]
    pub nic_policy: NicPolicy,
    #[command(flatten)]
    /// What holds for NICs.
    pub nics: NicArgs,
    /// Queues a disk or NIC may have, each with a thread of its own; as many as there are
    /// processors, if left out
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub queues: Option<u32>,
    /// Without effect, accepted for older scripts: requests are answered as they are done
    #[arg(long, value_name = "ORDER", default_value = "as-done", hide = true)]
    pub disk_answers: Answers,
    /// Where requests in flight are recorded for the daemon that takes over; a directory of root's alone
    #[arg(long, value_name = "DIR", default_value = RECORDS)]
    pub records: PathBuf,
    /// For every disk, as far as its own words do not say otherwise: iops=1000,bps=50M,direct and
    /// the like, with commas between (docs/disks.md has all)
    #[arg(long, value_name = "OPTIONS", value_parser = disk_options, default_value = "")]
    pub disk_options: DiskOptions,
    /// Where the log goes, instead of standard error
    #[arg(long, value_name = "PATH")]
    pub log: Option<PathBuf>,
}

/// What holds for NICs.
#[derive(Debug, Clone, Default, Args)]
pub struct NicArgs {
    /// What holds for a NIC of which nothing else is said, words with commas between: guard=ip,tx=10M
    /// (docs/nics.md has all)
    #[arg(long = "nic-options", value_name = "WORDS", default_value = "")]
    pub options: String,
    /// A rate that NICs may share (share=NAME): bytes a second, each way
    #[arg(long = "nic-share", value_name = "NAME=RATE")]
    pub shares: Vec<String>,
    /// A tap as the way out of a switch that NICs are plugged into (switch=NAME), on a bridge or
    /// on none
    #[arg(long = "nic-uplink", value_name = "SWITCH=TAP[@BRIDGE]")]
    pub uplinks: Vec<String>,
}

impl NicArgs {
    /// What they come to.
    ///
    /// # Errors
    /// A word that is none.
    pub fn site(&self) -> Result<Site, Failure> {
        let defaults = NicOptions::default().and(&self.options);
        let defaults = defaults.map_err(|e| Failure::input(e, "docs/nics.md has them all"))?;
        let mut site = Site { defaults, ..Site::default() };
        for share in &self.shares {
            let (name, rate) = share.split_once('=').unwrap_or((share, ""));
            let rate = shared_rate(rate).map_err(|expected| {
                Failure::input(format!("--nic-share {share}: {expected}"), "as in uplink=125M")
            })?;
            site.shares.insert(name.to_owned(), Share::new(rate));
        }
        for uplink in &self.uplinks {
            let (switch, tap) = uplink
                .split_once('=')
                .filter(|(s, t)| !s.is_empty() && !t.is_empty())
                .ok_or_else(|| {
                    Failure::input(format!("--nic-uplink {uplink}"), "as in lan=pvio-lan@xenbr0")
                })?;
            let (tap, bridge) = tap.split_once('@').map_or((tap, None), |(t, b)| (t, Some(b)));
            let mut config = TapConfig::new(tap);
            config.bridge = bridge.map(str::to_owned);
            site.switches.set_uplink(switch, config);
        }
        Ok(site)
    }
}

/// `pvio capture`.
#[derive(Debug, Clone, Args)]
pub struct CaptureArgs {
    /// The NIC, as in vif7.0: of guest 7, its first; those there are, if left out
    #[arg(value_name = "VIF", requires = "write")]
    pub vif: Option<String>,
    /// The file to write (pcapng); - is standard output
    #[arg(short = 'w', long, value_name = "FILE")]
    pub write: Option<PathBuf>,
    /// End after so many packets, instead of at Ctrl-C
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Bytes of each packet that are written; all, if left out
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(14..))]
    pub snaplen: Option<u32>,
    /// The state directory of a pvio run, instead of the one pvio serve or pvio run there is
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// `pvio stats`.
#[derive(Debug, Clone, Args)]
pub struct StatsArgs {
    /// Only these, as in vbd7.xvda: of guest 7, its xvda; or vif7.0
    #[arg(value_name = "DEVICE")]
    pub devices: Vec<String>,
    /// As JSON, each queue by itself
    #[arg(long)]
    pub json: bool,
    /// Again and again, every so many seconds, what was added a second; Ctrl-C ends it
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub every: Option<u64>,
    /// The state directory of a pvio run, instead of the one pvio serve or pvio run there is
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// Where `pvio serve` keeps in-flight records.
pub const RECORDS: &str = "/run/pvio/inflight";

/// In which order a disk's requests were answered by earlier versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Answers {
    /// As they were asked
    InOrder,
    /// As they are done
    AsDone,
}

/// `pvio revive`.
#[derive(Debug, Clone, Args)]
pub struct ReviveArgs {
    /// The driver domain's name or number
    pub domain: String,
}

/// What becomes of the devices when the daemon is told to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnStop {
    /// They are closed
    Close,
    /// They stay as they are, for the next daemon to go on with
    Leave,
}

/// Who attaches devices to what they lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Around {
    /// `xl`, or `xl devd`
    Toolstack,
    /// The daemon
    #[value(name = "self")]
    Itself,
}

/// A disk; its parts' failures are said in a line by clap.
pub(crate) fn disk(text: &str) -> Result<Disk, DiskError> {
    text.parse()
}

pub(crate) fn disk_options(text: &str) -> Result<DiskOptions, OptionError> {
    text.parse()
}

fn kind(word: &str) -> Result<BackendKind, String> {
    BackendKind::from_word(word).ok_or_else(|| {
        let all: Vec<&str> = BackendKind::ALL.iter().map(|k| k.as_str()).collect();
        format!("choose from {}", all.join(", "))
    })
}

/// What both commands take.
#[derive(Debug, Clone, Args)]
pub struct CommonArgs {
    /// The guest's name
    #[arg(long, default_value = "guest")]
    pub name: String,
    /// Folder for every socket and log; one that is removed afterwards if left out
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Read and write the image around the host's page cache (O_DIRECT)
    #[arg(long)]
    pub direct: bool,
}

impl CommonArgs {
    /// A disk as these arguments have it, with an absolute path.
    ///
    /// # Errors
    /// When there is no current folder.
    pub fn disk(&self, disk: &Disk) -> Result<Disk, Failure> {
        let spec = disk.spec.clone().absolute().map_err(Failure::of)?;
        let mut options = disk.options.clone();
        if self.direct {
            options.direct = Some(true);
        }
        options.trace = options.trace.map(std::path::absolute).transpose().map_err(Failure::of)?;
        Ok(Disk { options, spec })
    }
}

/// An IPv4 address and its prefix length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    /// The address.
    pub address: Ipv4Addr,
    /// Bits that name the network.
    pub prefix: u8,
}

impl Cidr {
    /// The first address of the network, or the second if the first is taken: the host's.
    #[must_use]
    pub fn host(&self) -> Ipv4Addr {
        let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0);
        let first = (u32::from(self.address) & mask) + 1;
        let own = u32::from(self.address);
        Ipv4Addr::from(if first == own { first + 1 } else { first })
    }
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || "give an address and a prefix length, as in 10.107.0.2/24".to_owned();
        let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
        let address: Ipv4Addr = address.parse().map_err(|_| bad())?;
        let prefix: u8 = prefix.parse().map_err(|_| bad())?;
        if !(1..=30).contains(&prefix) {
            return Err("the prefix length must be 1 to 30, so that two addresses fit".into());
        }
        let host_bits = u32::from(address) << prefix;
        if host_bits == 0 || host_bits == u32::MAX << prefix {
            return Err(format!("{address} is the network's own or its broadcast address"));
        }
        Ok(Self { address, prefix })
    }
}

impl std::fmt::Display for Cidr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// A MAC address of one station.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts.next().filter(|p| p.len() == 2);
            *byte = part
                .and_then(|p| u8::from_str_radix(p, 16).ok())
                .ok_or("give six bytes, as in 00:16:3e:6b:00:02")?;
        }
        if parts.next().is_some() || mac[0] & 1 != 0 || mac == [0; 6] {
            return Err("a station's address has six bytes, the first of them even".into());
        }
        Ok(Self(mac))
    }
}

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// What is wrong with the command line, in one line; the usage has many.
#[must_use]
pub fn misuse(e: &clap::Error) -> Failure {
    let text = e.render().to_string();
    let lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
    let what = lines.collect::<Vec<_>>().join(" ");
    if e.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return Failure::input("no command given", "try pvio run --nic, or pvio --help");
    }
    Failure::input(what.trim_start_matches("error: "), "see pvio --help")
}

/// Does what was asked for.
///
/// # Errors
/// A [`Failure`], to be shown.
pub fn execute(command: Command) -> Result<(), Failure> {
    match command {
        Command::Run(args) => crate::run::run(&args),
        Command::Check(args) => crate::check::check(&args),
        Command::Inspect(args) => crate::inspect::run(&args),
        Command::Serve(args) => crate::serve::run(&args),
        Command::Capture(args) => crate::capture::run(&args),
        Command::Stats(args) => crate::stats::run(&args),
        Command::AttachDisk(args) => crate::disks::attach::attach(&args),
        Command::DetachDisk(args) => crate::disks::attach::detach(&args),
        Command::SetDisk(args) => crate::disks::change::set(&args),
        Command::List(args) => crate::disks::list::run(&args),
        Command::Revive(args) => crate::revive::run(&args),
        Command::Domain(command) => {
            crate::domain::execute(command);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn addresses() {
        let cidr: Cidr = "10.107.0.2/24".parse().unwrap();
        assert_eq!(cidr.host(), Ipv4Addr::new(10, 107, 0, 1));
        let first: Cidr = "192.168.4.1/30".parse().unwrap();
        assert_eq!(first.host(), Ipv4Addr::new(192, 168, 4, 2));
        for bad in [
            "10.0.0.0/24",
            "10.0.0.255/24",
            "10.0.0.1",
            "10.0.0.1/31",
            "10.0.0.1/0",
            "x/24",
            "1.2.3.4/99",
        ] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn stations() {
        assert_eq!("00:16:3e:6b:00:02".parse::<Mac>().unwrap().to_string(), "00:16:3e:6b:00:02");
        for bad in [
            "",
            "01:00:00:00:00:00",
            "00:00:00:00:00:00",
            "0:16:3e:6b:0:2",
            "00:16:3e:6b:00:02:03",
            "00-16-3e-6b-00-02",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }
}
