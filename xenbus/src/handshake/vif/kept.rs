//! What a guest has set up over its rings, as its backend keeps it for the process that takes the session
//! over when this one dies. It stands in the backend's own directory, where the guest can read, and not
//! write.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use crate::handshake::HandshakeError;
use crate::handshake::fields::{Reader, Writer};
use crate::wire::parse_u32;
use crate::xenstore::Xenstore;

/// `pvio-hash`: types, key and table.
const HASH: &str = "pvio-hash";
/// `pvio-groups`: their addresses.
const GROUPS: &str = "pvio-groups";

/// Entries of a table and groups that are read, at most: as many as any backend keeps.
const ENTRIES_MAX: usize = 128;

/// How a guest has received packets hashed and spread over its queues. A guest that has none hashed has
/// none of this.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeptHash {
    /// Kinds of packets (`XEN_NETIF_CTRL_HASH_TYPE_*`).
    pub types: u32,
    /// The key, as far as it is not 0.
    pub key: Vec<u8>,
    /// The queue of each entry.
    pub table: Vec<u32>,
}

/// Reads what an earlier process kept; `None` if nothing is hashed.
///
/// # Errors
/// [`HandshakeError`] on anything that no process of ours has written.
pub fn read_kept_hash<X: Xenstore + ?Sized>(
    xs: &mut X,
    backend: &str,
) -> Result<Option<KeptHash>, HandshakeError> {
    let mut r = Reader { xs, base: backend };
    let Some(text) = r.raw(HASH)? else { return Ok(None) };
    match parse_hash(&text) {
        Some(hash) => Ok(Some(hash)),
        None => Err(r.malformed(HASH, &text, "types, a key in hexadecimal, and a table")),
    }
}

/// Writes that, or takes it away.
///
/// # Errors
/// xenstore's.
pub fn write_kept_hash<X: Xenstore + ?Sized>(
    xs: &mut X,
    backend: &str,
    hash: Option<&KeptHash>,
) -> Result<(), HandshakeError> {
    let text = hash.map(|KeptHash { types, key, table }| {
        let table: String = table.iter().map(|queue| format!(" {queue}")).collect();
        format!("{types} {}{table}", digits(key))
    });
    Writer { xs, base: backend }.opt(HASH, text)
}

/// Reads the multicast groups that a guest had named; none, if there are none.
///
/// # Errors
/// As [`read_kept_hash`].
pub fn read_kept_groups<X: Xenstore + ?Sized>(
    xs: &mut X,
    backend: &str,
) -> Result<Vec<[u8; 6]>, HandshakeError> {
    let mut r = Reader { xs, base: backend };
    let Some(text) = r.raw(GROUPS)? else { return Ok(Vec::new()) };
    let words = text.split(|byte| *byte == b' ').filter(|word| !word.is_empty());
    let group = |word| hex(word).and_then(|bytes| bytes.try_into().ok());
    let groups: Option<Vec<[u8; 6]>> = words.take(ENTRIES_MAX).map(group).collect();
    groups.ok_or_else(|| r.malformed(GROUPS, &text, "addresses of 12 hexadecimal digits each"))
}

/// Writes them.
///
/// # Errors
/// xenstore's.
pub fn write_kept_groups<X: Xenstore + ?Sized>(
    xs: &mut X,
    backend: &str,
    groups: &[[u8; 6]],
) -> Result<(), HandshakeError> {
    let groups: Vec<String> = groups.iter().map(|group| digits(group)).collect();
    let text = (!groups.is_empty()).then(|| groups.join(" "));
    Writer { xs, base: backend }.opt(GROUPS, text)
}

fn parse_hash(text: &[u8]) -> Option<KeptHash> {
    let mut words = text.split(|byte| *byte == b' ');
    let types = parse_u32(words.next()?)?;
    let key = hex(words.next()?)?;
    let table: Vec<u32> =
        words.take(ENTRIES_MAX.saturating_add(1)).map(parse_u32).collect::<Option<_>>()?;
    (table.len() <= ENTRIES_MAX).then_some(KeptHash { types, key, table })
}

/// Two digits for each byte.
fn digits(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes of two digits each; 64 of them at most.
fn hex(text: &[u8]) -> Option<Vec<u8>> {
    let (pairs, []) = text.as_chunks::<2>() else { return None };
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let byte = |[high, low]: &[u8; 2]| Some(digit(*high)? << 4 | digit(*low)?);
    (pairs.len() <= 64).then(|| pairs.iter().map(byte).collect())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{LocalClient, Quota, Store};
    use alloc::rc::Rc;
    use alloc::vec;
    use core::cell::RefCell;
    use pvio_ring::DomId;

    const BASE: &str = "/local/domain/0/backend/vif/1/0";

    fn client() -> LocalClient {
        LocalClient::connect(&Rc::new(RefCell::new(Store::new(Quota::default()))), DomId::DOM0)
    }

    #[test]
    fn what_is_written_is_read() {
        let mut xs = client();
        assert_eq!(read_kept_hash(&mut xs, BASE).unwrap(), None);
        assert_eq!(read_kept_groups(&mut xs, BASE).unwrap(), Vec::<[u8; 6]>::new());
        for (key, table) in
            [(vec![0, 255, 7], vec![0, 1, 255]), (vec![], vec![]), (vec![0xa5; 40], vec![255; 128])]
        {
            let hash = KeptHash { types: 15, key, table };
            write_kept_hash(&mut xs, BASE, Some(&hash)).unwrap();
            assert_eq!(read_kept_hash(&mut xs, BASE).unwrap(), Some(hash));
        }
        write_kept_hash(&mut xs, BASE, None).unwrap();
        assert_eq!(read_kept_hash(&mut xs, BASE).unwrap(), None);
        for count in [1, 64, 0] {
            let groups: Vec<[u8; 6]> = (0..count).map(|n| [1, 0, 0x5e, 0xff, 0, n]).collect();
            write_kept_groups(&mut xs, BASE, &groups).unwrap();
            assert_eq!(read_kept_groups(&mut xs, BASE).unwrap(), groups);
        }
    }

    #[test]
    fn what_nobody_of_ours_wrote_is_refused() {
        let mut xs = client();
        let long = alloc::format!("15 00{}", " 1".repeat(129));
        for bad in ["", "15", "x 00", "15 0", "15 0g", "15 00 x", "-1 00", "15 00 ", &long] {
            xs.write(&alloc::format!("{BASE}/{HASH}"), bad.as_bytes()).unwrap();
            assert!(read_kept_hash(&mut xs, BASE).is_err(), "{bad:?}");
        }
        for bad in ["01", "0100000000zz", "01000000000102", "010000000001,01"] {
            xs.write(&alloc::format!("{BASE}/{GROUPS}"), bad.as_bytes()).unwrap();
            assert!(read_kept_groups(&mut xs, BASE).is_err(), "{bad:?}");
        }
    }
}
