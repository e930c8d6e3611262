//! Queues of a frontend's request. A single queue has its keys in the frontend's directory, several
//! queues have theirs in `queue-%u`.

use alloc::collections::BTreeSet;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use crate::handshake::HandshakeError;
use crate::handshake::encoding::{ANY, Between, POSITIVE};
use crate::handshake::fields::{Reader, Writer};

/// The number of queues, written if there are several.
pub(in crate::handshake) const NUM_QUEUES: &str = "multi-queue-num-queues";

/// Reads the number of queues, at most `most`.
pub(in crate::handshake) fn read_count(
    r: &mut Reader<'_>,
    most: u32,
) -> Result<u32, HandshakeError> {
    Ok(r.get(NUM_QUEUES, Between(1, most))?.unwrap_or(1))
}

/// Reads each queue.
pub(in crate::handshake) fn read_each<Q>(
    r: &mut Reader<'_>,
    count: u32,
    mut read: impl FnMut(&mut Reader<'_>) -> Result<Q, HandshakeError>,
) -> Result<Vec<Q>, HandshakeError> {
    (0..count)
        .map(|n| {
            let base =
                if count == 1 { String::from(r.base) } else { queue_path(r.base, n as usize) };
            read(&mut Reader { xs: &mut *r.xs, base: &base })
        })
        .collect()
}

/// Writes each queue, and their number.
pub(in crate::handshake) fn write_each<Q>(
    w: &mut Writer<'_>,
    queues: &[Q],
    mut write: impl FnMut(&mut Writer<'_>, &Q) -> Result<(), HandshakeError>,
) -> Result<(), HandshakeError> {
    if let [queue] = queues {
        return write(w, queue);
    }
    w.put(NUM_QUEUES, queues.len())?;
    for (n, queue) in queues.iter().enumerate() {
        let base = queue_path(w.base, n);
        write(&mut Writer { xs: &mut *w.xs, base: &base }, queue)?;
    }
    Ok(())
}

fn queue_path(base: &str, n: usize) -> String {
    format!("{base}/queue-{n}")
}

/// Grant references and event channels of a request's rings. Each may be used once.
#[derive(Default)]
pub(in crate::handshake) struct Used {
    refs: BTreeSet<u32>,
    channels: BTreeSet<u32>,
}

impl Used {
    /// Reads a grant reference.
    pub fn read_ref(&mut self, r: &mut Reader<'_>, key: &str) -> Result<u32, HandshakeError> {
        let gref = r.need(key, ANY)?;
        self.add_ref(r, key, gref)
    }

    /// Adds a grant reference that was read from `key`.
    pub fn add_ref(&mut self, r: &Reader<'_>, key: &str, gref: u32) -> Result<u32, HandshakeError> {
        once(r, key, gref, &mut self.refs)
    }

    /// Reads an event channel.
    pub fn read_channel(&mut self, r: &mut Reader<'_>, key: &str) -> Result<u32, HandshakeError> {
        let channel = r.need(key, POSITIVE)?;
        once(r, key, channel, &mut self.channels)
    }
}

fn once(
    r: &Reader<'_>,
    key: &str,
    value: u32,
    used: &mut BTreeSet<u32>,
) -> Result<u32, HandshakeError> {
    if used.insert(value) {
        return Ok(value);
    }
    Err(HandshakeError::Duplicate { path: r.path(key), value: u64::from(value) })
}
