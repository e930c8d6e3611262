//! A bounded queue of received events.

use alloc::collections::{BTreeSet, VecDeque};
use alloc::string::String;
use alloc::vec::Vec;

use crate::wire::strings;
use crate::xenstore::WatchEvent;

/// Maximum number of distinct events that a client queues. Further events are merged:
/// each becomes an event on the watched path of every watch with the same token.
pub const EVENT_LIMIT: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct Events {
    order: VecDeque<WatchEvent>,
    waiting: BTreeSet<WatchEvent>,
    watches: Vec<WatchEvent>,
}

impl Events {
    pub fn push(&mut self, event: WatchEvent) {
        if self.order.len() < EVENT_LIMIT {
            self.add(event);
            return;
        }
        // An event identifies its watch only by the token, so all watches with that token get an
        // event.
        let concerned: Vec<_> =
            self.watches.iter().filter(|w| w.token == event.token).cloned().collect();
        for watch in concerned {
            self.add(watch);
        }
    }

    pub fn pop(&mut self) -> Option<WatchEvent> {
        let event = self.order.pop_front()?;
        self.waiting.remove(&event);
        Some(event)
    }

    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    pub fn watched(&mut self, body: &[u8]) {
        if let Some(watch) = parse_event(body) {
            self.watches.push(watch);
        }
    }

    pub fn unwatched(&mut self, body: &[u8]) {
        if let Some(watch) = parse_event(body) {
            self.watches.retain(|w| *w != watch);
        }
    }

    pub fn reset(&mut self) {
        self.watches.clear();
    }

    fn add(&mut self, event: WatchEvent) {
        if self.waiting.insert(event.clone()) {
            self.order.push_back(event);
        }
    }
}

/// Returns the path and the token in an event's payload, or in the payload of a watch request.
pub(super) fn parse_event(body: &[u8]) -> Option<WatchEvent> {
    let mut parts = strings(body).map(|s| String::from_utf8_lossy(s).into_owned());
    Some(WatchEvent { path: parts.next()?, token: parts.next()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_overflow_is_merged_into_one_event_for_watch_path() {
        let mut events = Events::default();
        events.watched(b"/backend\0t\0");
        events.watched(b"/other\0u\0");
        for i in 0..10_000 {
            events.push(WatchEvent { path: alloc::format!("/backend/{i}"), token: "t".into() });
        }
        events.push(WatchEvent { path: "/backend/3".into(), token: "t".into() });
        let all: Vec<_> = core::iter::from_fn(|| events.pop()).collect();
        assert_eq!(all.len(), EVENT_LIMIT + 1);
        assert_eq!(all.last().unwrap().path, "/backend");
        events.push(WatchEvent { path: "/backend/3".into(), token: "t".into() });
        assert_eq!(events.pop().unwrap().path, "/backend/3");
    }
}
