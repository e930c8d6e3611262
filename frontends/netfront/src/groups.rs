//! The multicast groups that a NIC receives, and which of them the backend has accepted. Each group
//! is added or removed by a transmit request without a packet.

use crate::fault::{BackendFault, SendError};
use crate::packet::Group;
use crate::queue::Queue;
use alloc::collections::BTreeMap;
use core::net::IpAddr;
use pvio_event_channel::EventChannels;
use pvio_grant_table::Granter;

/// Maximum number of groups of a NIC: the limit of Linux's netback, and of pvio's.
pub const GROUPS_MAX: usize = 64;

/// Why a group was not joined.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GroupError {
    /// The address is unicast or broadcast.
    #[error("{0:02x?} is no group's address")]
    NoGroup(Group),
    /// [`GROUPS_MAX`] groups are joined.
    #[error("64 groups are joined already")]
    Full,
}

/// State of the backend's multicast filter.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Hearing {
    /// All groups are received: filtering was not requested, or is not in effect.
    #[default]
    All,
    /// All groups are received: the backend does not support filtering.
    NotOffered,
    /// Only joined groups are received.
    Joined,
    /// The backend had no room for some of the groups ([`Groups::refused`]). It was requested to
    /// send all groups, if it supports that request while connected.
    Overflowed,
}

/// The groups of a NIC; at most one change is outstanding.
#[derive(Debug, Default)]
pub struct Groups {
    all: BTreeMap<Group, Place>,
    under_way: Option<(Group, bool)>,
}

/// State of one group.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    wanted: bool,
    /// The backend reported that it added the group.
    there: bool,
    /// The backend rejected the group.
    refused: bool,
}

impl Place {
    /// Returns whether a change of this group must be sent to the backend.
    const fn is_news(&self) -> bool {
        self.wanted != self.there && !self.refused
    }
}

impl Groups {
    /// Joins a group; it is joined again after a backend restart.
    ///
    /// # Errors
    /// [`GroupError`].
    pub fn join(&mut self, group: Group) -> Result<(), GroupError> {
        if group[0] & 1 == 0 || group == [0xff; 6] {
            return Err(GroupError::NoGroup(group));
        }
        if self.all.len() >= GROUPS_MAX && !self.all.contains_key(&group) {
            return Err(GroupError::Full);
        }
        let place = self.all.entry(group).or_default();
        // Joining a rejected group again sends it again.
        (place.wanted, place.refused) = (true, false);
        Ok(())
    }

    /// Leaves a group. Returns whether it was joined.
    pub fn leave(&mut self, group: Group) -> bool {
        let Some(place) = self.all.get_mut(&group) else { return false };
        let was = core::mem::replace(&mut place.wanted, false);
        place.refused = false;
        self.forget();
        was
    }

    /// Returns the groups that are joined.
    pub fn joined(&self) -> impl Iterator<Item = Group> {
        self.all.iter().filter(|(_, place)| place.wanted).map(|(group, _)| *group)
    }

    /// Returns the groups that are joined and that the backend rejected.
    pub fn refused(&self) -> impl Iterator<Item = Group> {
        self.all.iter().filter(|(_, place)| place.refused).map(|(group, _)| *group)
    }

    /// Returns whether all changes were sent to the backend and have responses.
    #[must_use]
    pub fn are_sent(&self) -> bool {
        self.under_way.is_none() && !self.all.values().any(Place::is_news)
    }

    /// Resets the state for a new backend, which has no groups.
    pub(crate) fn begin(&mut self) {
        self.under_way = None;
        for place in self.all.values_mut() {
            (place.there, place.refused) = (false, false);
        }
        self.forget();
    }

    /// Takes the response to the outstanding change, if there is one, and sends the next change. If
    /// the queue has no room, the next step tries again.
    pub(crate) fn step<P: Granter + EventChannels>(
        &mut self,
        queue: &mut Queue<P>,
    ) -> Result<(), BackendFault> {
        if let Some((group, joins)) = self.under_way {
            let Some(done) = queue.group_answer()? else { return Ok(()) };
            self.under_way = None;
            if let Some(place) = self.all.get_mut(&group) {
                // If a backend fails to remove a group, it never had it.
                place.there = joins && done;
                place.refused = joins && !done && place.wanted;
            }
            self.forget();
        }
        let next = self.all.iter().find(|(_, place)| place.is_news());
        let Some((group, place)) = next.map(|(group, place)| (*group, *place)) else {
            return Ok(());
        };
        match queue.tell_group(group, place.wanted) {
            Ok(()) => {
                self.under_way = Some((group, place.wanted));
                queue.publish()
            }
            Err(SendError::Fault(fault)) => Err(fault),
            // The queue is full: the next step tries again.
            Err(_) => Ok(()),
        }
    }

    /// Removes groups that are not joined and that the backend does not have.
    fn forget(&mut self) {
        let under_way = self.under_way.map(|(group, _)| group);
        let stays =
            |group: &Group, place: &Place| place.wanted || place.there || under_way == Some(*group);
        self.all.retain(|group, place| stays(group, place));
    }
}

/// Returns the station address of an IP multicast group (RFC 1112, RFC 2464); `None` if the address
/// is not multicast.
#[must_use]
pub fn group_of(address: IpAddr) -> Option<Group> {
    match address {
        IpAddr::V4(v4) if v4.is_multicast() => {
            let [_, b, c, d] = v4.octets();
            Some([1, 0, 0x5e, b & 0x7f, c, d])
        }
        IpAddr::V6(v6) if v6.is_multicast() => {
            let [.., a, b, c, d] = v6.octets();
            Some([0x33, 0x33, a, b, c, d])
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(n: u8) -> Group {
        [1, 0, 0x5e, 0, 0, n]
    }

    #[test]
    fn join_accepts_only_multicast_addresses_and_at_most_64() {
        let mut groups = Groups::default();
        for strange in [[0; 6], [2, 0, 0, 0, 0, 1], [0xff; 6]] {
            assert_eq!(groups.join(strange), Err(GroupError::NoGroup(strange)));
        }
        for n in 0..64 {
            groups.join(group(n)).unwrap();
        }
        assert_eq!(groups.join(group(64)), Err(GroupError::Full));
        groups.join(group(63)).unwrap();
        assert!(groups.leave(group(0)) && !groups.leave(group(0)));
        groups.join(group(64)).unwrap();
        assert_eq!(groups.joined().count(), 64);
        assert!(!groups.are_sent());
    }

    #[test]
    fn ip_multicast_address_maps_to_mac() {
        let of = |text: &str| group_of(text.parse().unwrap());
        assert_eq!(of("224.0.0.251"), Some([1, 0, 0x5e, 0, 0, 251]));
        assert_eq!(of("239.255.255.250"), Some([1, 0, 0x5e, 0x7f, 0xff, 0xfa]));
        assert_eq!(of("ff02::1:ff01:203"), Some([0x33, 0x33, 0xff, 1, 2, 3]));
        assert_eq!((of("192.0.2.1"), of("fe80::1"), of("255.255.255.255")), (None, None, None));
    }
}
