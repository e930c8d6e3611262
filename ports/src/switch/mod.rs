//! A switch between the vifs of one driver domain: a packet goes from guest to guest without a tap,
//! and without being copied on the way between their two copies.
//!
//! | file | holds |
//! |---|---|
//! | `table` | which station is behind which member |
//! | `inbox` | what waits for a queue: bounded in bytes, in buffers of the receiver's own |
//! | `port` | a queue's end, as a port |
//! | `uplink` | a tap as a member, for the world outside |
//!
//! A packet keeps what is left to do to it: one to be segmented stays whole, and a blank checksum
//! blank, for guests that take that; for others it is cut (here) or completed (by their queue).
//! It goes to the member behind whom its station was last heard; broadcast, multicast and what is
//! not known go to all others. Of a receiver's queues it takes one by its addresses and ports.
//!
//! No lock is taken for a packet. A receiver that is slow loses packets of its own
//! ([`RxSwitch`](pvio_netback::fault::DropReason::RxSwitch)), and nobody waits for it. A guest that sends
//! under another's address takes away what that one should receive, as with any learning bridge:
//! a [guard](super::guard) keeps it from doing so.
#![forbid(unsafe_code)]

mod inbox;
mod port;
mod table;
mod uplink;

pub use port::{Lane, SwitchPort};
pub use uplink::Uplink;

use super::setting::Setting;
use super::tap::{Tap, TapConfig, TapError};
use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};
use inbox::Inbox;
use std::io;
use std::sync::{Mutex, PoisonError};
use table::Table;

/// Where the members of a switch are joined.
#[derive(Debug)]
pub struct Switch {
    table: Table,
    /// By number.
    members: Arc<Setting<Vec<Arc<Member>>>>,
    /// Its uplink's thread has ended.
    uplink_lost: AtomicBool,
}

/// A member: a vif with a guest, or an uplink.
#[derive(Debug)]
struct Member {
    /// Not 0.
    number: u16,
    inboxes: Vec<Arc<Inbox>>,
}

impl Switch {
    /// One without members.
    #[must_use]
    pub fn new() -> Arc<Self> {
        let (table, members) = (Table::default(), Setting::new(Vec::new()));
        Arc::new(Self { table, members, uplink_lost: AtomicBool::new(false) })
    }

    /// A member joins, with so many queues, which take TCP unsegmented over IPv4 and IPv6 or do not.
    /// It is one for as long as it keeps what it is given.
    ///
    /// # Errors
    /// For want of descriptors, or of numbers.
    pub fn join(self: &Arc<Self>, queues: usize, takes: (bool, bool)) -> io::Result<Socket> {
        let inboxes = core::iter::repeat_with(|| Inbox::new(takes).map(Arc::new));
        let inboxes = inboxes.take(queues.max(1)).collect::<io::Result<Vec<_>>>()?;
        let mut joined = None;
        self.members.update(|all| {
            let taken = |number: &u16| all.iter().any(|member| member.number == *number);
            let Some(number) = (1..=u16::MAX).find(|number| !taken(number)) else {
                return all.clone();
            };
            let member = Arc::new(Member { number, inboxes });
            joined = Some(Arc::clone(&member));
            let mut all: Vec<_> = all.iter().chain([&member]).map(Arc::clone).collect();
            all.sort_by_key(|member| member.number);
            all
        });
        let member = joined.ok_or_else(|| io::Error::other("the switch has too many members"))?;
        Ok(Socket { switch: Arc::clone(self), member })
    }

    /// The uplink does not work any more: the workers of all members end, which closes their devices.
    fn lose_uplink(&self) {
        self.uplink_lost.store(true, Ordering::Release);
        let members = self.members.get();
        members.iter().flat_map(|member| &member.inboxes).for_each(|inbox| inbox.ring());
    }

    fn has_lost_uplink(&self) -> bool {
        self.uplink_lost.load(Ordering::Acquire)
    }

    /// How many members it has.
    #[must_use]
    pub fn members(&self) -> usize {
        self.members.get().len()
    }
}

/// A member's place.
#[derive(Debug)]
pub struct Socket {
    switch: Arc<Switch>,
    member: Arc<Member>,
}

/// One of a member's queues, to be made a [`SwitchPort`] or a [`Lane`] of.
#[derive(Debug)]
pub struct End {
    switch: Arc<Switch>,
    number: u16,
    inbox: Arc<Inbox>,
}

impl Socket {
    /// The queue of that number, counted from 0.
    ///
    /// # Errors
    /// It has no such queue.
    pub fn end(&self, queue: usize) -> io::Result<End> {
        let inbox = self.member.inboxes.get(queue).map(Arc::clone);
        let inbox = inbox.ok_or_else(|| io::Error::other("the member has no such queue"))?;
        Ok(End { switch: Arc::clone(&self.switch), number: self.member.number, inbox })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let number = self.member.number;
        let others = |all: &Vec<Arc<Member>>| {
            all.iter().filter(|member| member.number != number).map(Arc::clone).collect()
        };
        self.switch.members.update(others);
    }
}

/// The switches of a driver domain, by their names: each is there from the first vif that is plugged
/// into it.
#[derive(Debug, Default)]
pub struct Switches {
    uplinks: BTreeMap<String, TapConfig>,
    made: Mutex<BTreeMap<String, Made>>,
}

#[derive(Debug)]
struct Made {
    switch: Arc<Switch>,
    _uplink: Option<Uplink>,
}

impl Switches {
    /// A tap that the switch of that name is to have for an uplink.
    pub fn set_uplink(&mut self, switch: &str, tap: TapConfig) {
        self.uplinks.insert(switch.into(), tap);
    }

    /// The switch of that name.
    ///
    /// # Errors
    /// It has no uplink though it is to have one.
    pub fn get(&self, name: &str) -> Result<Arc<Switch>, TapError> {
        let mut all = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = all.get(name).filter(|made| !made.switch.has_lost_uplink()) {
            return Ok(Arc::clone(&made.switch));
        }
        // One whose uplink was lost is made anew, after what is left of its tap is gone.
        drop(all.remove(name));
        let switch = Switch::new();
        let uplink = match self.uplinks.get(name) {
            None => None,
            Some(config) => {
                let tap = Tap::create(config)?;
                let started = Uplink::start("uplink", &switch, tap);
                Some(started.map_err(|error| TapError::NoUplink(error.to_string()))?)
            }
        };
        all.insert(name.into(), Made { switch: Arc::clone(&switch), _uplink: uplink });
        Ok(switch)
    }
}
