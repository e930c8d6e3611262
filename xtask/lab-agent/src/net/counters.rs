//! The kernel's counters of interfaces and protocols.

use std::fs;

use anyhow::{Context, Result};

/// Returns a counter of an interface, such as `rx_bytes`.
///
/// # Errors
/// The interface or counter does not exist.
pub fn interface(name: &str, counter: &str) -> Result<u64> {
    let path = format!("/sys/class/net/{name}/statistics/{counter}");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    text.trim().parse().context(path)
}

/// Returns a counter of a protocol in the calling thread's network namespace, such as `Ip` and
/// `FragCreates`.
///
/// # Errors
/// The protocol or counter does not exist.
pub fn protocol(protocol: &str, counter: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/thread-self/net/snmp")?;
    find(&text, protocol, counter).with_context(|| format!("no {protocol} {counter}"))
}

/// Lines are in pairs: names, then numbers.
fn find(text: &str, protocol: &str, counter: &str) -> Option<u64> {
    let rest = |line: &'_ str| {
        let (name, rest) = line.split_once(": ")?;
        (name == protocol).then(|| rest.to_owned())
    };
    let mut lines = text.lines().filter_map(rest);
    let (names, numbers) = (lines.next()?, lines.next()?);
    let at = names.split(' ').position(|name| name == counter)?;
    numbers.split(' ').nth(at)?.parse().ok()
}

/// Returns the number of events of each event channel of a NIC: `vif0-q0-tx` and the like.
///
/// # Errors
/// They cannot be read.
pub fn interrupts(nic: &str) -> Result<Vec<(String, u64)>> {
    let text = fs::read_to_string("/proc/interrupts")?;
    let of = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let name = words.last().filter(|name| name.starts_with(&format!("{nic}-q")))?;
        let counts = words.iter().skip(1).map_while(|word| word.parse::<u64>().ok());
        Some(((*name).to_owned(), counts.sum()))
    };
    Ok(text.lines().filter_map(of).collect())
}

#[cfg(test)]
mod tests {
    use super::find;

    #[test]
    fn proc_net_counter_is_found_by_name() {
        let text = "Ip: A B\nIp: 1 2\nUdp: A B InCsumErrors\nUdp: 3 4 5\n";
        assert_eq!(find(text, "Ip", "B"), Some(2));
        assert_eq!(find(text, "Udp", "InCsumErrors"), Some(5));
        assert_eq!(find(text, "Ip", "InCsumErrors"), None);
        assert_eq!(find(text, "Tcp", "A"), None);
    }
}
