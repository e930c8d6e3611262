//! The multicast groups that a NIC is to hear, and how far the backend knows of them: each is named to it
//! in a transmit request that carries no packet.

use crate::fault::{BackendFault, SendError};
use crate::packet::Group;
use crate::queue::Queue;
use alloc::collections::BTreeMap;
use core::net::IpAddr;
use pvio_event_channel::EventChannels;
use pvio_grant_table::Granter;

/// Groups of a NIC at most: what Linux's netback keeps of one, and ours.
pub const GROUPS_MAX: usize = 64;

/// Why a group is not joined.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GroupError {
    /// The address is one station's, or everybody's.
    #[error("{0:02x?} is no group's address")]
    NoGroup(Group),
    /// There are [`GROUPS_MAX`] already.
    #[error("64 groups are joined already")]
    Full,
}

/// How far it has come that only the groups joined are heard.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Hearing {
    /// Every group is heard: nothing else was asked for, or the backend has not been told yet.
    #[default]
    All,
    /// Every group is heard: the backend does not choose among them.
    NotOffered,
    /// Only groups that were joined are heard.
    Joined,
    /// The backend had no place for some of them ([`Groups::refused`]), and was asked to send all
    /// if it can be asked that while connected.
    Overflowed,
}

/// The groups of a NIC; there is one change under way at a time.
#[derive(Debug, Default)]
pub struct Groups {
    all: BTreeMap<Group, Place>,
    under_way: Option<(Group, bool)>,
}

/// One group.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    wanted: bool,
    /// The backend has it, by its word.
    there: bool,
    /// The backend did not take it.
    refused: bool,
}

impl Place {
    /// Whether the backend is to be told of it.
    const fn is_news(&self) -> bool {
        self.wanted != self.there && !self.refused
    }
}

impl Groups {
    /// A group that is to be heard from now on, also after the backend was restarted.
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
        // Joined again, it is tried again.
        (place.wanted, place.refused) = (true, false);
        Ok(())
    }

    /// A group that need not be heard any more; whether it was joined.
    pub fn leave(&mut self, group: Group) -> bool {
        let Some(place) = self.all.get_mut(&group) else { return false };
        let was = core::mem::replace(&mut place.wanted, false);
        place.refused = false;
        self.forget();
        was
    }

    /// Those that are joined.
    pub fn joined(&self) -> impl Iterator<Item = Group> {
        self.all.iter().filter(|(_, place)| place.wanted).map(|(group, _)| *group)
    }

    /// Those that are joined, and the backend does not send.
    pub fn refused(&self) -> impl Iterator<Item = Group> {
        self.all.iter().filter(|(_, place)| place.refused).map(|(group, _)| *group)
    }

    /// Whether the backend has been told of all of them, and has answered.
    #[must_use]
    pub fn are_told(&self) -> bool {
        self.under_way.is_none() && !self.all.values().any(Place::is_news)
    }

    /// A backend that knows of none.
    pub(crate) fn begin(&mut self) {
        self.under_way = None;
        for place in self.all.values_mut() {
            (place.there, place.refused) = (false, false);
        }
        self.forget();
    }

    /// Takes the answer to what was told, if it is there, and tells what comes next. A queue without
    /// room is asked again by the next step.
    pub(crate) fn step<P: Granter + EventChannels>(
        &mut self,
        queue: &mut Queue<P>,
    ) -> Result<(), BackendFault> {
        if let Some((group, joins)) = self.under_way {
            let Some(done) = queue.group_answer()? else { return Ok(()) };
            self.under_way = None;
            if let Some(place) = self.all.get_mut(&group) {
                // One that a backend does not take back either was never there.
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
            // Full: by the next step.
            Err(_) => Ok(()),
        }
    }

    /// Drops what nobody wants and the backend has not.
    fn forget(&mut self) {
        let under_way = self.under_way.map(|(group, _)| group);
        let stays =
            |group: &Group, place: &Place| place.wanted || place.there || under_way == Some(*group);
        self.all.retain(|group, place| stays(group, place));
    }
}

/// The station address of a group of IP's (RFC 1112, RFC 2464); `None` where the address is none's.
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
    fn what_can_be_joined_and_how_many() {
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
        assert!(!groups.are_told());
    }

    #[test]
    fn the_stations_of_ip_groups() {
        let of = |text: &str| group_of(text.parse().unwrap());
        assert_eq!(of("224.0.0.251"), Some([1, 0, 0x5e, 0, 0, 251]));
        assert_eq!(of("239.255.255.250"), Some([1, 0, 0x5e, 0x7f, 0xff, 0xfa]));
        assert_eq!(of("ff02::1:ff01:203"), Some([0x33, 0x33, 0xff, 1, 2, 3]));
        assert_eq!((of("192.0.2.1"), of("fe80::1"), of("255.255.255.255")), (None, None, None));
    }
}
