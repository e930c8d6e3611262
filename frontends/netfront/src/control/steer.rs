//! Configuration of hash and steering: a sequence of requests.

use super::Ask;
use crate::steering::{ENTRIES_EVEN, Refusal, Steering, SteeringState};
use alloc::vec::Vec;
use pvio_grant_table::GrantRef;
use pvio_ring::proto::netif::{CtrlAsk, CtrlStatus, HASH_NONE, HASH_TOEPLITZ, HashTypes};

/// State of the configuration.
#[derive(Debug, Default)]
pub(super) struct Steer {
    wanted: Option<Steering>,
    at: At,
    state: SteeringState,
    /// The backend may hash now, so hashing must be disabled explicitly.
    hashes: bool,
    /// The configuration changed while a request was outstanding: its response is ignored.
    anew: bool,
    /// The complete table.
    table: Vec<u32>,
}

/// The next request. The last one enables hashing, when everything else is configured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum At {
    #[default]
    Done,
    Algorithm,
    Types,
    Key,
    Most,
    Size,
    Table,
    Enable,
    /// Disable hashing.
    Stop,
}

impl Steer {
    /// Sets the configuration; `under_way` is whether a steering request is outstanding.
    pub fn want(&mut self, wanted: Option<Steering>, queues: usize, under_way: bool) {
        self.anew = under_way;
        let table = wanted.as_ref().and_then(Steering::table).unwrap_or_default();
        let strange = table.iter().find(|queue| **queue as usize >= queues).copied();
        (self.at, self.state) = match (&wanted, strange) {
            (Some(_), None) => (At::Algorithm, SteeringState::Pending),
            (Some(_), Some(queue)) => (At::Done, SteeringState::NoQueue(queue)),
            (None, _) => (At::Done, SteeringState::Off),
        };
        self.wanted = wanted;
        if self.at == At::Done && self.hashes {
            self.at = At::Stop;
        }
    }

    pub const fn state(&self) -> SteeringState {
        self.state
    }

    /// Returns whether no request is left to send.
    pub fn is_done(&self) -> bool {
        self.at == At::Done
    }

    /// Returns the next request; data that do not fit into its slot are the contents of `page`.
    pub fn next(&mut self, page: GrantRef) -> Option<Ask> {
        let steering = self.wanted.as_ref();
        let key = steering.map(Steering::key).unwrap_or_default();
        let types = steering.map(Steering::types).unwrap_or_default();
        let len = self.table.len() as u32;
        Some(match self.at {
            At::Done => return None,
            At::Algorithm => {
                self.hashes = true;
                CtrlAsk::SetHashAlgorithm(HASH_TOEPLITZ).into()
            }
            At::Types => CtrlAsk::GetHashFlags.into(),
            At::Key => {
                Ask { what: CtrlAsk::SetHashKey { page, len: key.len() as u32 }, page: key.into() }
            }
            At::Most => CtrlAsk::GetHashMappingSize.into(),
            At::Size => CtrlAsk::SetHashMappingSize(len).into(),
            At::Table => Ask {
                what: CtrlAsk::SetHashMapping { page, len, offset: 0 },
                page: self.table.iter().flat_map(|queue| queue.to_le_bytes()).collect(),
            },
            At::Enable => CtrlAsk::SetHashFlags(types.bits()).into(),
            At::Stop => CtrlAsk::SetHashAlgorithm(HASH_NONE).into(),
        })
    }

    /// Processes the response to the last request.
    pub fn answered(&mut self, kind: u16, status: u32, data: u32, queues: usize) {
        if core::mem::take(&mut self.anew) {
            return;
        }
        if status != CtrlStatus::Success as u32 {
            return self.give_up(SteeringState::Refused(Refusal { kind, status }));
        }
        self.at = match self.at {
            At::Algorithm => At::Types,
            At::Types => {
                let there = HashTypes::from_bits_truncate(data);
                let wanted = self.wanted.as_ref().map(Steering::types).unwrap_or_default();
                if !there.contains(wanted) {
                    return self.give_up(SteeringState::NoTypes(there.intersection(wanted)));
                }
                At::Key
            }
            At::Key => At::Most,
            At::Most => match self.fill(data, queues) {
                Ok(()) => At::Size,
                Err(most) => return self.give_up(SteeringState::NoEntries(most)),
            },
            // With a table of size 0 the backend selects queues by hash modulo number of queues.
            At::Size if self.table.is_empty() => At::Enable,
            At::Size => At::Table,
            At::Table => At::Enable,
            At::Enable => {
                self.state = SteeringState::On;
                At::Done
            }
            At::Stop => {
                self.hashes = false;
                At::Done
            }
            At::Done => At::Done,
        };
    }

    /// Builds the table, for a backend that supports `most` entries.
    fn fill(&mut self, most: u32, queues: usize) -> Result<(), u32> {
        let queues = queues as u32;
        let given = self.wanted.as_ref().and_then(Steering::table);
        self.table = match given {
            Some(table) if table.len() > most as usize => return Err(most),
            Some(table) => table.into(),
            None => (0..most.min(ENTRIES_EVEN)).filter_map(|at| at.checked_rem(queues)).collect(),
        };
        Ok(())
    }

    /// Abandons the configuration and disables hashing.
    fn give_up(&mut self, why: SteeringState) {
        // The first reason is the one that is reported.
        if self.at != At::Stop || self.state == SteeringState::Off {
            self.state = why;
        }
        self.at = if self.at == At::Stop { At::Done } else { At::Stop };
    }
}
