//! Functions that the tests share.
#![allow(dead_code)]

pub mod process;

use pvio_event_channel::EventChannel;
use pvio_grant_table::DomId;
use pvio_hosted::{Channel, Domain, DomainConfig, Hypervisor, HypervisorEvent};
use pvio_ring::shm::{Region, SharedMemory};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::sync::atomic::Ordering;
use std::time::Duration;
use tempfile::TempDir;

/// Timeout for any operation; never a measure of speed.
pub const LOST: Duration = Duration::from_secs(30);

/// Hypervisor in a temporary directory.
pub struct Host {
    pub hypervisor: Hypervisor,
    pub dir: TempDir,
}

impl Host {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { hypervisor: Hypervisor::start(dir.path()).unwrap(), dir }
    }

    pub fn create(&self, name: &str) -> DomId {
        self.hypervisor.create_domain(DomainConfig::new(name).memory_pages(64)).unwrap()
    }

    pub fn join(&self, id: DomId) -> Domain {
        Domain::join(self.dir.path(), id).unwrap()
    }

    pub fn domain(&self, name: &str) -> Domain {
        self.join(self.create(name))
    }

    /// Waits until a domain is destroyed.
    pub fn wait_death(&self, id: DomId) {
        loop {
            let event =
                self.hypervisor.events().recv_timeout(LOST).expect("domain was not removed");
            if event == (HypervisorEvent::Died { domid: id }) {
                return;
            }
        }
    }
}

/// One side of a lockstep exchange: words 0 and 1 of a shared page count the two sides' turns.
/// Every turn waits for the other side, so the first lost wake-up stops both.
///
/// The way of waiting changes from turn to turn, so that the other side is met in every state:
/// sleeping immediately, or sleeping after polling.
pub fn lockstep(page: &impl SharedMemory, bell: &Channel, first: bool, turns: u32) {
    let (mine, theirs) = if first { (0, 4) } else { (4, 0) };
    let mut noise = 0x9e37_79b9_u32;
    for turn in 1..=turns {
        let seen = |at| page.load_u32(at, Ordering::Acquire).unwrap() >= turn;
        if first {
            page.store_u32(mine, turn, Ordering::Release);
            bell.notify().unwrap();
        }
        noise ^= noise << 13;
        noise ^= noise >> 17;
        noise ^= noise << 5;
        let (looks, dawdles) = ((noise >> 8) & 0x3ff, noise >> 19);
        if noise & 3 != 0 {
            (0..looks).take_while(|_| !seen(theirs)).for_each(|_| std::hint::spin_loop());
        }
        while !seen(theirs) {
            sleep(bell, turn);
            bell.take().unwrap();
        }
        if !first {
            // Sometimes long enough for the other side to be asleep, or about to sleep.
            if noise & 12 == 0 {
                (0..dawdles).for_each(|_| std::hint::spin_loop());
            }
            page.store_u32(mine, turn, Ordering::Release);
            bell.notify().unwrap();
        }
    }
}

/// One side sends events as fast as it can, and counts them in word 2 of a shared page. The other
/// side sleeps and takes events until it has seen the last. A lost wake-up leaves an event pending
/// without a wake-up, so that no later event wakes the receiver either: the test fails immediately.
pub fn flood(page: &impl SharedMemory, bell: &Channel, first: bool, events: u32) {
    if first {
        for event in 1..=events {
            page.store_u32(8, event, Ordering::Release);
            bell.notify().unwrap();
        }
        return;
    }
    let mut seen = 0;
    while seen < events {
        sleep(bell, seen);
        if bell.take().unwrap() {
            seen = page.load_u32(8, Ordering::Acquire).unwrap();
        }
    }
}

/// Sleeps as an io_uring does: on the descriptor only, without a check of the bits before.
fn sleep(bell: &Channel, turn: u32) {
    let lost = Timespec::try_from(LOST).unwrap();
    let woken = poll(&mut [PollFd::new(bell, PollFlags::IN)], Some(&lost)).unwrap();
    assert!(woken == 1, "wakeup was lost after turn {turn}");
}

/// Returns the number of open descriptors of this process.
pub fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Returns the number of mappings of domains' files in this process.
pub fn mapped_memfds() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("/memfd:pvio-")).count()
}
