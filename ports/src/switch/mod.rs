//! A switch between the vifs of one driver domain. A packet goes from guest to guest without a tap;
//! the switch itself does not copy it.
//!
//! | file | holds |
//! |---|---|
//! | `table` | address table: the member of each station |
//! | `rx_queue` | packets that wait for a queue: bounded in bytes, in the receiver's buffers |
//! | `port` | a queue's connection, as a port |
//! | `uplink` | a tap as a member, for external networks |
//!
//! A packet keeps its offloads: an unsegmented packet and a blank checksum stay so for guests that
//! accept them. For other guests the packet is segmented here, or its checksum is completed by
//! their queue. A packet is sent to the member from which its destination was last seen as a
//! source. Broadcast, multicast and unknown destinations are sent to all other members. The queue
//! of a receiver is selected by a hash of addresses and ports.
//!
//! No lock is taken for a packet. A slow receiver loses only its own packets
//! ([`RxSwitch`](pvio_netback::fault::DropReason::RxSwitch)), and senders never wait for it. A
//! guest that sends with another guest's source address receives that guest's packets, as with any
//! learning bridge. A [guard](crate::wrappers::guard) prevents that.
#![forbid(unsafe_code)]

mod port;
mod rx_queue;
mod table;
mod uplink;

pub use port::{SwitchPort, SwitchQueue};
pub use uplink::Uplink;

use crate::tap::{Tap, TapConfig, TapError};
use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};
use pvio_runtime::Setting;
use rx_queue::RxQueue;
use std::io;
use std::sync::{Mutex, PoisonError};
use table::Table;

/// Switch with its members.
#[derive(Debug)]
pub struct Switch {
    table: Table,
    /// Members, sorted by number.
    members: Arc<Setting<Vec<Arc<Member>>>>,
    /// Whether the uplink's thread has ended.
    uplink_lost: AtomicBool,
}

/// Member of a switch: a vif with a connected guest, or an uplink.
#[derive(Debug)]
struct Member {
    /// Number of the member; not 0.
    number: u16,
    queues: Vec<Arc<RxQueue>>,
}

impl Switch {
    /// Creates a switch without members.
    #[must_use]
    pub fn new() -> Arc<Self> {
        let (table, members) = (Table::default(), Setting::new(Vec::new()));
        Arc::new(Self { table, members, uplink_lost: AtomicBool::new(false) })
    }

    /// Adds a member with `queues` queues. `takes` holds whether they accept unsegmented TCP over
    /// IPv4 and over IPv6. It stays a member until the returned value is dropped.
    ///
    /// # Errors
    /// Fails if there are no more descriptors or member numbers.
    pub fn join(
        self: &Arc<Self>,
        queues: usize,
        takes: (bool, bool),
    ) -> io::Result<SwitchMembership> {
        let rx_queues = core::iter::repeat_with(|| RxQueue::new(takes).map(Arc::new));
        let queues = rx_queues.take(queues.max(1)).collect::<io::Result<Vec<_>>>()?;
        let mut joined = None;
        self.members.update(|all| {
            let taken = |number: &u16| all.iter().any(|member| member.number == *number);
            let Some(number) = (1..=u16::MAX).find(|number| !taken(number)) else {
                return all.clone();
            };
            let member = Arc::new(Member { number, queues });
            joined = Some(Arc::clone(&member));
            let mut all: Vec<_> = all.iter().chain([&member]).map(Arc::clone).collect();
            all.sort_by_key(|member| member.number);
            all
        });
        let member = joined.ok_or_else(|| io::Error::other("the switch has too many members"))?;
        Ok(SwitchMembership { switch: Arc::clone(self), member })
    }

    /// Marks the uplink as lost: the workers of all members end, which closes their devices.
    fn lose_uplink(&self) {
        self.uplink_lost.store(true, Ordering::Release);
        let members = self.members.get();
        members.iter().flat_map(|member| &member.queues).for_each(|rx| rx.event().notify());
    }

    fn has_lost_uplink(&self) -> bool {
        self.uplink_lost.load(Ordering::Acquire)
    }

    /// Returns the number of members.
    #[must_use]
    pub fn members(&self) -> usize {
        self.members.get().len()
    }
}

/// Membership in a switch.
#[derive(Debug)]
pub struct SwitchMembership {
    switch: Arc<Switch>,
    member: Arc<Member>,
}

/// Connection of one of a member's queues, for a [`SwitchPort`] or a [`SwitchQueue`].
#[derive(Debug)]
pub struct MemberQueue {
    switch: Arc<Switch>,
    number: u16,
    rx: Arc<RxQueue>,
}

impl SwitchMembership {
    /// Returns the connection of the queue with that number, counted from 0.
    ///
    /// # Errors
    /// The member has no such queue.
    pub fn queue(&self, queue: usize) -> io::Result<MemberQueue> {
        let rx = self.member.queues.get(queue).map(Arc::clone);
        let rx = rx.ok_or_else(|| io::Error::other("the member has no such queue"))?;
        Ok(MemberQueue { switch: Arc::clone(&self.switch), number: self.member.number, rx })
    }
}

impl Drop for SwitchMembership {
    fn drop(&mut self) {
        let number = self.member.number;
        let others = |all: &Vec<Arc<Member>>| {
            all.iter().filter(|member| member.number != number).map(Arc::clone).collect()
        };
        self.switch.members.update(others);
    }
}

/// Switches of a driver domain, by name. Each is created when the first vif joins it.
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
    /// Configures a tap as the uplink of the switch of that name.
    pub fn set_uplink(&mut self, switch: &str, tap: TapConfig) {
        self.uplinks.insert(switch.into(), tap);
    }

    /// Returns the switch of that name.
    ///
    /// # Errors
    /// The configured uplink cannot be created.
    pub fn get(&self, name: &str) -> Result<Arc<Switch>, TapError> {
        let mut all = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = all.get(name).filter(|made| !made.switch.has_lost_uplink()) {
            return Ok(Arc::clone(&made.switch));
        }
        // A switch whose uplink was lost is created again. Its old tap is removed first.
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
