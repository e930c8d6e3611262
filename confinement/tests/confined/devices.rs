//! Device processes.

use crate::parent::{
    EACCES, ENOENT, EPERM, Fate, KILLED, expect, has, is_root, layers, run, scenario,
};
use pvio_confinement::{Enforcement, FileAccess, Layer, ProcessKind};

pub const TESTS: &[(&str, fn())] = &[
    ("device_process_opens_no_file", opens_no_file),
    ("device_process_without_empty_root_opens_no_file", landlock_alone),
    ("device_process_reaches_no_other_process", reaches_no_other_process),
    ("device_process_gets_no_rights", gets_no_rights),
    ("device_process_reaches_no_network", reaches_no_network),
    ("device_process_creates_nothing", creates_nothing),
    ("device_process_makes_no_other_request_of_a_descriptor", arguments_are_checked),
    ("device_process_serves", serves),
    ("device_process_that_aborts_dies_of_the_abort", aborts),
    ("thread_started_before_the_filter_is_filtered", all_threads),
    ("filter_that_logs_kills_nothing", logs),
    ("device_process_has_every_layer_that_the_kernel_has", every_layer),
];

const DEVICES: [ProcessKind; 2] = [ProcessKind::Disk, ProcessKind::Nic];

fn opens_no_file() {
    for kind in DEVICES {
        expect(
            kind,
            &[Layer::Landlock, Layer::EmptyRoot],
            &[
                // The name does not exist in the empty root; Landlock denies the root itself.
                ("open-file", &[ENOENT], EACCES),
                ("open-root", &[EACCES], EACCES),
                // A directory that the parent left open.
                ("open-beneath", &[EACCES], EACCES),
            ],
        );
    }
}

fn landlock_alone() {
    let mut scenario = scenario(ProcessKind::Disk, None, "open-file");
    scenario.layers.namespaces.empty_root = false;
    let (applied, fate) = run(&scenario);
    if has(&applied, &[Layer::Landlock]) {
        assert_eq!(fate, EACCES);
    }
    // The attempt succeeds without Landlock: the test would notice if it were not applied.
    scenario.layers.files = FileAccess::Unrestricted;
    assert_eq!(run(&scenario).1, Fate::Done);
}

fn reaches_no_other_process() {
    expect(
        ProcessKind::Disk,
        &[Layer::Landlock, Layer::Capabilities],
        &[
            ("read-parent", &[EACCES], EACCES),
            ("ptrace", &[EPERM, Fate::Error(libc::ESRCH)], KILLED),
            ("kill", &[EPERM, Fate::Error(libc::ESRCH)], KILLED),
            ("process-vm-readv", &[EPERM, Fate::Error(libc::ESRCH)], KILLED),
        ],
    );
    // Without its own PID namespace the process can name its parent.
    if !is_root() {
        return println!("SKIPPED: the parent has the same user; run as root");
    }
    for attempt in ["ptrace", "kill", "process-vm-readv"] {
        let mut scenario = scenario(ProcessKind::Disk, None, attempt);
        scenario.own_pid_namespace = false;
        let (applied, fate) = run(&scenario);
        if has(&applied, &[Layer::User]) {
            assert!(matches!(fate, Fate::Error(libc::EPERM | libc::ESRCH)), "{attempt}: {fate:?}");
        }
    }
}

fn gets_no_rights() {
    expect(
        ProcessKind::Disk,
        &[Layer::Capabilities, Layer::NoNewPrivileges],
        &[
            ("mount", &[EPERM, EACCES], KILLED),
            ("chroot", &[EPERM], KILLED),
            // In a user namespace, user 0 does not exist.
            ("setuid", &[EPERM, Fate::Error(libc::EINVAL)], KILLED),
            ("raise-limit", &[EPERM], KILLED),
            ("execve", &[ENOENT, EACCES], KILLED),
        ],
    );
}

fn reaches_no_network() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let target = listener.local_addr().unwrap().to_string();
    let mut scenario = scenario(ProcessKind::Disk, None, "connect");
    scenario.target.clone_from(&target);
    let (applied, fate) = run(&scenario);
    // The namespace has no interface that is up.
    if has(&applied, &[Layer::NetworkNamespace, Layer::Landlock]) {
        assert!(matches!(fate, Fate::Error(libc::ENETUNREACH | libc::EACCES)), "{fate:?}");
    }
    // Landlock alone.
    scenario.layers.namespaces.network = false;
    let (applied, fate) = run(&scenario);
    let abi_has_tcp = format!("{}", applied.outcome(Layer::Landlock)).contains("TCP");
    if has(&applied, &[Layer::Landlock]) && abi_has_tcp {
        assert_eq!(fate, EACCES);
    } else {
        println!("SKIPPED: Landlock of this kernel does not restrict TCP; take Linux 6.7 or later");
    }
    scenario.layers.files = FileAccess::Unrestricted;
    assert_eq!(run(&scenario).1, Fate::Done);
    scenario.calls = Some(Enforcement::Kill);
    assert_eq!(run(&scenario).1, KILLED);
}

fn creates_nothing() {
    expect(
        ProcessKind::Nic,
        &[],
        &[
            ("socket", &[Fate::Done], KILLED),
            ("io-uring-setup", &[Fate::Done], KILLED),
            ("thread", &[Fate::Done], KILLED),
            ("executable-memory", &[Fate::Done], KILLED),
        ],
    );
}

fn arguments_are_checked() {
    expect(
        ProcessKind::Disk,
        &[],
        &[
            ("ioctl", &[Fate::Done], KILLED),
            ("fcntl", &[Fate::Done], KILLED),
            ("io-uring-probe", &[Fate::Done], KILLED),
        ],
    );
}

fn serves() {
    for kind in DEVICES {
        expect(kind, &[], &[("serve", &[Fate::Done], Fate::Done)]);
    }
}

fn aborts() {
    // The kernel drops SIGABRT to process 1 of a namespace; then the processor faults.
    for (pid, signal) in [(false, libc::SIGABRT), (true, libc::SIGSEGV)] {
        if pid && !is_root() {
            println!("SKIPPED: a PID namespace; run as root");
            continue;
        }
        for calls in [None, Some(Enforcement::Kill)] {
            let mut scenario = scenario(ProcessKind::Disk, calls, "abort");
            scenario.own_pid_namespace = pid;
            assert_eq!(run(&scenario).1, Fate::Signal(signal), "{calls:?}");
        }
    }
}

fn all_threads() {
    expect(ProcessKind::Disk, &[], &[("socket-on-thread", &[Fate::Done], KILLED)]);
}

fn logs() {
    for attempt in ["socket", "io-uring-setup", "thread", "serve"] {
        let (applied, fate) = run(&scenario(ProcessKind::Disk, Some(Enforcement::Log), attempt));
        if has(&applied, &[Layer::SystemCalls]) {
            assert_eq!(fate, Fate::Done, "{attempt}");
        }
    }
}

fn every_layer() {
    for kind in DEVICES {
        let mut scenario = scenario(kind, Some(Enforcement::Kill), "serve");
        scenario.layers = layers(kind);
        let (applied, _) = run(&scenario);
        let configured = Layer::ALL.into_iter().filter(|layer| match layer {
            Layer::Cgroup => false,
            Layer::UserNamespace => !is_root(),
            Layer::User | Layer::PidNamespace => is_root(),
            _ => true,
        });
        if has(&applied, &configured.collect::<Vec<_>>()) {
            println!("{applied}");
        }
    }
}
