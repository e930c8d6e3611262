//! `pvio serve`: the daemon of a driver domain on Xen, in dom0 or another domain.

use crate::control::{self, Control};
use crate::disks::args::{ImageRootArgs, disk_options};
use crate::driver::{self, Options, XenstoreLink};
use crate::failure::{Failure, say};
use crate::isolation::IsolationArgs;
use crate::lock::{Scope, ServiceLock};
use crate::nics::NicArgs;
use crate::served::Served;
use crate::startup;
use crate::stop::{Stop, Wakeup};
use crate::upgrade::handover;
use crate::upgrade::progress::Upgrade;
use clap::{Args, ValueEnum};
use pvio_blkback::Config;
use pvio_blkback::path::Policy;
use pvio_grant_table::DomId;
use pvio_netback::queue::Policy as NicPolicy;
use pvio_ring::error::Report;
use pvio_storage::MappingBudgets;
use pvio_storage::image::DiskOptions;
use pvio_xen_linux::XenDomain;
use pvio_xenbus::XsError;
use pvio_xenbus::client::Client;
use pvio_xenbus::driver::HotplugMode;
use pvio_xenbus::handshake::common::BackendKind;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use tracing_subscriber::EnvFilter;

/// Arguments of `pvio serve`.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Kinds of backend to serve (vbd, qdisk, pvio-vbd, vif, pvio-vif); if left out, all that no
    /// driver of Linux serves
    #[arg(long, value_name = "KIND", value_delimiter = ',', value_parser = parse_kind)]
    pub kinds: Vec<BackendKind>,
    /// Who sets up the devices on the host, such as taps on bridges: the toolstack with its hotplug
    /// scripts, as xl does in dom0, or this daemon, as is usual in other domains
    #[arg(long, value_name = "WHO")]
    pub hotplug: Option<HotplugArg>,
    /// What to do with the devices when the daemon is stopped
    #[arg(long, value_name = "WHAT", default_value = "close")]
    pub on_stop: OnStop,
    /// How disks access guest pages: map, copy, persistent-or-map or persistent-or-copy
    #[arg(long, value_name = "POLICY", default_value_t = Policy::PersistentOrCopy)]
    pub disk_policy: Policy,
    /// How NICs access guest pages: copy or map
    #[arg(long, value_name = "POLICY", default_value_t = NicPolicy::Copy)]
    pub nic_policy: NicPolicy,
    #[command(flatten)]
    /// Options of NICs.
    pub nics: NicArgs,
    /// Maximum number of queues of a disk or NIC, each with its own thread; the number of
    /// processors if left out
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub queues: Option<u32>,
    /// Without effect, accepted for older scripts: requests complete in any order
    #[arg(long, value_name = "ORDER", default_value = "as-done", hide = true)]
    pub disk_answers: ResponseOrder,
    /// Directory of the in-flight records, from which the next daemon resumes the sessions; only
    /// root may have access
    #[arg(long, value_name = "DIR", default_value = DEFAULT_RECORDS)]
    pub records: PathBuf,
    /// Default options of disks, such as iops=1000,direct (see docs/disks.md)
    #[arg(long, value_name = "OPTIONS", value_parser = disk_options(), default_value = "")]
    pub disk_options: DiskOptions,
    #[command(flatten)]
    /// Budgets of cached mappings.
    pub mappings: MappingArgs,
    #[command(flatten)]
    /// Directories of the files that images name.
    pub image_roots: ImageRootArgs,
    #[command(flatten)]
    /// Processes of the devices.
    pub isolation: IsolationArgs,
    /// File of the log, instead of standard error
    #[arg(long, value_name = "PATH")]
    pub log: Option<PathBuf>,
}

/// Directory of the in-flight records of `pvio serve`.
pub const DEFAULT_RECORDS: &str = "/run/pvio/inflight";

/// The order of a disk's responses in earlier versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ResponseOrder {
    /// The order of the requests
    InOrder,
    /// The order of completion
    AsDone,
}

/// What to do with the devices when the daemon is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnStop {
    /// Close them
    Close,
    /// Leave them as they are, for the next daemon to resume
    Leave,
}

/// Who sets up the devices on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum HotplugArg {
    /// `xl`, or `xl devd`
    Toolstack,
    /// The daemon
    #[value(name = "self")]
    Daemon,
}

fn parse_kind(word: &str) -> Result<BackendKind, String> {
    BackendKind::from_word(word).ok_or_else(|| {
        let all: Vec<&str> = BackendKind::ALL.iter().map(|k| k.as_str()).collect();
        format!("unknown kind {word:?}: expected one of {}", all.join(", "))
    })
}

/// The domain that this process runs in.
pub struct Host(XenDomain);

impl Host {
    /// Opens the Xen device nodes.
    ///
    /// # Errors
    /// The text names the missing device node, and what provides it.
    pub fn open() -> Result<Self, Failure> {
        XenDomain::open().map(Self).map_err(|e| Failure::of(e).as_input())
    }

    /// Returns the platform.
    #[must_use]
    pub fn domain(&self) -> &XenDomain {
        &self.0
    }

    /// Returns the domain's number.
    #[must_use]
    pub fn id(&self) -> DomId {
        self.0.id()
    }

    /// Connects to xenstore.
    ///
    /// # Errors
    /// There is none.
    pub fn xenstore(&self) -> Result<Client, Failure> {
        self.0.xenstore().map_err(Failure::of)
    }
}

/// Budgets of cached mappings of guest pages.
#[derive(Debug, Clone, Args)]
pub struct MappingArgs {
    /// Maximum number of pages of all guests that disks keep mapped (persistent grants); half of
    /// vm.max_map_count if left out
    #[arg(long, value_name = "PAGES")]
    mappings: Option<usize>,
    /// Maximum number of such pages per guest; half of the above if left out
    #[arg(long, value_name = "PAGES")]
    guest_mappings: Option<usize>,
}

impl MappingArgs {
    fn budgets(&self) -> MappingBudgets {
        MappingBudgets::with(self.mappings, self.guest_mappings)
    }
}

/// Serves devices until the daemon is stopped.
///
/// # Errors
/// This is not a Xen domain, another backend serves one of the kinds, or the connection to xenstore
/// is lost.
pub fn run(args: &ServeArgs) -> Result<(), Failure> {
    startup::prepare()?;
    log_to(args.log.as_deref())?;
    let wakeup = Wakeup::new()?;
    let stop = Stop::on_signal(wakeup.clone())?;
    let host = Host::open()?;
    let kinds = kinds(args, host.id())?;
    let _lock = ServiceLock::take(Path::new(control::FOLDER), &kinds, Scope::AllGuests)?;
    let hotplug_mode = match (args.hotplug, host.id()) {
        (Some(HotplugArg::Toolstack), _) | (None, DomId::DOM0) => HotplugMode::Scripts,
        (Some(HotplugArg::Daemon), _) | (None, _) => HotplugMode::DriverDomain,
    };
    let most = Config::for_this_machine();
    let disks = Config {
        policy: args.disk_policy,
        max_queues: args.queues.unwrap_or(most.max_queues),
        ..most
    };
    let mut disk_options = args.disk_options.clone();
    args.image_roots.add_to(&mut disk_options)?;
    let leave = args.on_stop == OnStop::Leave;
    let records = driver::records(&args.records)?;
    let options = Options {
        kinds,
        hotplug_mode,
        resume: true,
        leave,
        records: Some(records.clone()),
        disks,
        disk_options,
        mappings: args.mappings.budgets(),
        nic_policy: args.nic_policy,
        nic_queues: args.queues,
        nic_settings: args.nics.settings()?.into(),
        isolation: args.isolation.isolation(
            &Path::new(control::FOLDER).join("devices"),
            "xen",
            &records,
        )?,
        ..Options::default()
    };
    let mut xs = XenstoreLink::reconnecting(host.xenstore()?, || host.domain().xenstore());
    let me = (host.domain(), host.id());
    let served = Served::default();
    let _control = Control::listen(Path::new(control::FOLDER), &served)?;
    driver::run(me, &mut xs, &options, &served, (&stop, &wakeup), || say!("ready"))
        .map_err(xenstore_lost)?;
    match served.upgrade().and_then(Upgrade::request) {
        Some(request) => Err(handover::begin(request, Path::new(control::FOLDER))),
        None => Ok(()),
    }
}

/// Returns the failure for a lost connection to xenstore.
#[must_use]
pub fn xenstore_lost(e: XsError) -> Failure {
    Failure::new(
        format!("the connection to xenstore was lost: {}", Report(&e)),
        "check that xenstored is running, then start this again: guests keep their devices until then",
    )
}

/// Returns the kinds to serve: those requested, or all that no driver of Linux serves.
fn kinds(args: &ServeArgs, id: DomId) -> Result<Vec<BackendKind>, Failure> {
    if args.kinds.is_empty() {
        let all = [BackendKind::Vbd, BackendKind::PvioVbd, BackendKind::Vif, BackendKind::PvioVif];
        let mut kinds: Vec<BackendKind> =
            all.into_iter().filter(|k| kernel_backend(*k).is_none()).collect();
        for driver in all.into_iter().filter_map(kernel_backend) {
            tracing::warn!(driver, "a kind is not served: a kernel module serves it (rmmod it)");
        }
        // In dom0, `xl` starts a device model that serves `qdisk`.
        if id != DomId::DOM0 {
            kinds.push(BackendKind::Qdisk);
        }
        return Ok(kinds);
    }
    for kind in &args.kinds {
        if let Some(driver) = kernel_backend(*kind) {
            return Err(Failure::input(
                format!(
                    "{} devices cannot be served: Linux's backend {driver} is loaded",
                    kind.as_str()
                ),
                format!(
                    "unload it (modprobe -r {driver}) and prevent loading it again (blacklist)"
                ),
            ));
        }
    }
    Ok(args.kinds.clone())
}

/// Returns the kernel module of Linux's own backend of that kind, if it is loaded here.
fn kernel_backend(kind: BackendKind) -> Option<&'static str> {
    let module = match kind {
        BackendKind::Vbd => "xen-blkback",
        BackendKind::Vif => "xen-netback",
        BackendKind::Qdisk | BackendKind::PvioVbd | BackendKind::PvioVif => return None,
    };
    let driver = Path::new("/sys/bus/xen-backend/drivers").join(kind.as_str());
    driver.exists().then_some(module)
}

/// Starts logging to a file, or to standard error; `RUST_LOG` sets the level.
///
/// # Errors
/// The file cannot be written.
pub fn log_to(path: Option<&Path>) -> Result<(), Failure> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_ansi(false).with_env_filter(filter);
    match path {
        None => builder.with_writer(std::io::stderr).init(),
        Some(path) => {
            let file = File::options().create(true).append(true).open(path).map_err(|e| {
                let what = format!("the log {} cannot be written: {e}", path.display());
                Failure::input(what, "name another with --log")
            })?;
            builder.with_writer(Mutex::new(file)).init();
        }
    }
    Ok(())
}
