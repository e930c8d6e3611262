//! What the tests share.
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

/// How long anything may take before the test takes it for lost; never a measure of speed.
pub const LOST: Duration = Duration::from_secs(30);

/// A hypervisor in a directory of its own.
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
            let event = self.hypervisor.events().recv_timeout(LOST).expect("it never died");
            if event == (HypervisorEvent::Died { domid: id }) {
                return;
            }
        }
    }
}

/// One side of a lockstep exchange: words 0 and 1 of a shared page count the two sides' turns.
/// Every turn waits for the other side, so the first wake-up that is lost stops both.
///
/// How it waits changes from turn to turn, so as to meet the other side in every place: straight to
/// sleep; after looking for a while; after looking for a while with events masked.
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
        let (masked, looks, dawdles) = (noise & 3 == 1, (noise >> 8) & 0x3ff, noise >> 19);
        if masked {
            bell.mask();
        }
        if noise & 3 != 0 {
            (0..looks).take_while(|_| !seen(theirs)).for_each(|_| std::hint::spin_loop());
        }
        if masked {
            bell.unmask();
        }
        while !seen(theirs) {
            sleep(bell, turn);
            bell.take().unwrap();
        }
        if !first {
            // Long enough now and then for the other side to be asleep, or about to be.
            if noise & 12 == 0 {
                (0..dawdles).for_each(|_| std::hint::spin_loop());
            }
            page.store_u32(mine, turn, Ordering::Release);
            bell.notify().unwrap();
        }
    }
}

/// One side sends events as fast as it can, counting them in word 2 of a shared page; the other
/// sleeps and takes until it saw the last. A wake-up that is lost leaves an event pending that
/// nobody was told of, so that every later one is not told of either: it shows at once.
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

/// Sleeps as an io_uring does: on the descriptor alone, without a look at the bits first.
fn sleep(bell: &Channel, turn: u32) {
    let lost = Timespec::try_from(LOST).unwrap();
    let woken = poll(&mut [PollFd::new(bell, PollFlags::IN)], Some(&lost)).unwrap();
    assert!(woken == 1, "a wake-up was lost after {turn}");
}

/// Open descriptors of this process.
pub fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Mappings of domains' files in this process.
pub fn mapped_memfds() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("/memfd:pvio-")).count()
}
