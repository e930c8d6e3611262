//! The queues of a tap: one interface, with a handle for each of its queues.
#![forbid(unsafe_code)]

use super::config::{TapConfig, TapError};
use super::device::Tap;
use super::netns::inside;
use super::open_vswitch;
use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;
use std::time::Instant;

/// Longest time for which an interface may survive its process.
const RELEASE: Duration = Duration::from_secs(2);

/// One handle per queue. The first is always in use.
#[derive(Debug, Default)]
pub(crate) struct TapQueues {
    all: Vec<Tap>,
    in_use: usize,
    /// Names of the interface and the bridge that it joined.
    joined: Option<(String, String)>,
}

impl Drop for TapQueues {
    fn drop(&mut self) {
        if let Some((tap, bridge)) = &self.joined {
            open_vswitch::leave(tap, bridge);
        }
    }
}

impl TapQueues {
    /// Creates the interface. Retries while the name is in use, possibly by a process that was
    /// killed: its io_uring holds the tap until the kernel has released it, shortly after the
    /// process ends.
    pub fn create_once_free(config: &TapConfig, queues: u32) -> Result<Self, TapError> {
        let begin = Instant::now();
        loop {
            match Self::create(config, queues) {
                Err(TapError::NameInUse(_)) if begin.elapsed() < RELEASE => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                created => return created,
            }
        }
    }

    pub fn create(config: &TapConfig, queues: u32) -> Result<Self, TapError> {
        let all = within(config.netns.as_deref(), || make(Tap::create(config)?, queues))?;
        let joined = config.bridge.clone().map(|bridge| (config.name.clone(), bridge));
        Ok(Self { all, in_use: 1, joined })
    }

    /// Opens the queues of an existing interface.
    pub fn open(name: &str, netns: Option<&str>, queues: u32) -> Result<Self, TapError> {
        let all = within(netns, || make(Tap::open(name, queues > 1)?, queues))?;
        Ok(Self { all, in_use: 1, joined: None })
    }

    /// Returns the queues of an interface that another process opened, in their order.
    pub fn from_opened(queues: Vec<Tap>) -> Result<Self, TapError> {
        let mut opened = Self { all: queues, in_use: 0, joined: None };
        opened.count_in_use()?;
        Ok(opened)
    }

    /// Counts the queues in use, which another process may have changed.
    pub fn count_in_use(&mut self) -> Result<(), TapError> {
        self.in_use = 0;
        for tap in &self.all {
            if !tap.is_in_use()? {
                break;
            }
            self.in_use = self.in_use.saturating_add(1);
        }
        Ok(())
    }

    /// Returns every queue.
    pub fn all(&self) -> &[Tap] {
        &self.all
    }

    pub fn first(&self) -> Option<&Tap> {
        self.all.first()
    }

    pub fn get(&self, index: usize) -> Option<&Tap> {
        self.all.get(index)
    }

    /// Sets the number of queues over which the kernel distributes packets.
    pub fn use_queues(&mut self, count: usize) -> Result<(), TapError> {
        while self.in_use < count
            && let Some(tap) = self.all.get(self.in_use)
        {
            tap.set_in_use(true)?;
            self.in_use = self.in_use.saturating_add(1);
        }
        while self.in_use > count
            && let Some(tap) = self.all.get(self.in_use.saturating_sub(1))
        {
            tap.set_in_use(false)?;
            self.in_use = self.in_use.saturating_sub(1);
        }
        Ok(())
    }
}

fn within<T: Send>(
    netns: Option<&str>,
    work: impl FnOnce() -> Result<T, TapError> + Send,
) -> Result<T, TapError> {
    match netns {
        None => work(),
        Some(name) => inside(name, work),
    }
}

fn make(first: Tap, queues: u32) -> Result<Vec<Tap>, TapError> {
    let mut all = Vec::from([first]);
    for _ in 1..queues {
        if let Some(first) = all.first() {
            let queue = first.add_queue()?;
            queue.set_in_use(false)?;
            all.push(queue);
        }
    }
    Ok(all)
}
