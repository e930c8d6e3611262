//! The watches, and the bounded event queue of each connection.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::id::ConnId;
use pvio_xenbus::wire::{PAYLOAD_MAX, parent};

#[derive(Clone, Debug)]
pub(crate) struct Watch {
    pub conn: ConnId,
    pub token: Box<[u8]>,
    /// Number of levels below the watched path that are reported; `None` for all.
    pub depth: Option<u32>,
    /// Length of the prefix of absolute paths that is removed in the client's events.
    pub strip: usize,
}

impl Watch {
    /// Returns an event's path in the form of the client's watch.
    pub fn show<'p>(&self, path: &'p str) -> &'p str {
        path.get(self.strip..).unwrap_or("")
    }
}

/// All watches, by path.
#[derive(Default, Debug)]
pub(crate) struct Watches {
    by_path: BTreeMap<Box<str>, Vec<Watch>>,
}

impl Watches {
    pub fn contains(&self, path: &str, conn: ConnId, token: &[u8]) -> bool {
        self.on(path).iter().any(|w| w.conn == conn && *w.token == *token)
    }

    pub fn add(&mut self, path: &str, watch: Watch) {
        self.by_path.entry(path.into()).or_default().push(watch);
    }

    /// Removes one watch; returns whether it existed.
    pub fn remove(&mut self, path: &str, conn: ConnId, token: &[u8]) -> bool {
        let Some(list) = self.by_path.get_mut(path) else {
            return false;
        };
        let before = list.len();
        list.retain(|w| w.conn != conn || *w.token != *token);
        let removed = list.len() < before;
        if list.is_empty() {
            self.by_path.remove(path);
        }
        removed
    }

    /// Returns every watch with the path it is on.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Watch)> {
        self.by_path.iter().flat_map(|(path, list)| list.iter().map(move |watch| (&**path, watch)))
    }

    /// Returns the watches on exactly this path.
    pub fn on(&self, path: &str) -> &[Watch] {
        self.by_path.get(path).map_or(&[], |list| list.as_slice())
    }

    /// Returns the watches that a change of `path` concerns, each with its path: those on the path
    /// and on every node above it, within their depth.
    pub fn concerned<'s>(
        &'s self,
        path: &'s str,
        exact: bool,
    ) -> impl Iterator<Item = (&'s str, &'s Watch)> {
        let mut at = Some(path);
        let mut below = 0_u32;
        let levels = core::iter::from_fn(move || {
            let here = at?;
            at = if exact { None } else { parent(here) };
            let level = below;
            below = below.saturating_add(1);
            Some((here, level))
        });
        levels.flat_map(move |(here, level)| {
            self.on(here)
                .iter()
                .filter(move |w| w.depth.is_none_or(|d| level <= d))
                .map(move |w| (here, w))
        })
    }
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Event {
    pub path: Box<str>,
    pub token: Box<[u8]>,
}

impl Event {
    /// Returns the length of the payload, in bytes.
    pub fn len(&self) -> usize {
        self.path.len().saturating_add(self.token.len()).saturating_add(2)
    }

    pub fn emit(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.path.as_bytes());
        out.push(0);
        out.extend_from_slice(&self.token);
        out.push(0);
    }

    pub fn text(&self) -> (String, String) {
        (self.path.as_ref().into(), String::from_utf8_lossy(&self.token).into_owned())
    }
}

/// The queued events of one connection.
///
/// An event that is already queued is not queued again. If `limit` events are queued, a further one
/// is replaced by an event on the watched path itself, of which there is at most one per watch. So
/// a client that does not read cannot make the queue grow (XSA-349), and still learns what to read
/// again.
#[derive(Default, Debug)]
pub(crate) struct EventQueue {
    order: VecDeque<Arc<Event>>,
    waiting: BTreeSet<Arc<Event>>,
}

impl EventQueue {
    pub fn push(&mut self, path: &str, watched: &str, token: &[u8], limit: usize) {
        let mut event = Event { path: path.into(), token: token.into() };
        if event.len() > PAYLOAD_MAX || self.order.len() >= limit {
            event.path = watched.into();
        }
        let event = Arc::new(event);
        if self.waiting.insert(Arc::clone(&event)) {
            self.order.push_back(event);
        }
    }

    pub fn pop(&mut self) -> Option<Arc<Event>> {
        let event = self.order.pop_front()?;
        self.waiting.remove(&event);
        Some(event)
    }

    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    pub fn clear(&mut self) {
        self.order.clear();
        self.waiting.clear();
    }
}
