//! A peer in another domain, controlled through xenstore.
//!
//! Below a node of the guest that both may write (`/local/domain/<guest>/data/pvio`), `ask` holds a
//! number and a command, and `answer` holds the same number and the result.

use crate::checks::{LOST, LocalPeer, Peer, same, say};
use pvio_event_channel::Port;
use pvio_grant_table::{Access, DomId, GrantRef};
use pvio_xen_linux::XenDomain;
use pvio_xenbus::client::Client;
use pvio_xenbus::{Xenstore, XsError};
use std::time::{Duration, Instant};

pub struct RemotePeer {
    id: DomId,
    base: String,
    xs: Client,
    asked: u32,
}

impl RemotePeer {
    /// Returns the peer that [`serve`]s below `base`; waits until it runs.
    pub fn meet(id: DomId, base: String, mut xs: Client) -> Result<Self, String> {
        xs.watch(&format!("{base}/answer"), "answer").map_err(say)?;
        let mut peer = Self { id, base, xs, asked: 0 };
        // Its domain may still be booting.
        let hello = peer.await_answer(0, LOST * 15)?;
        same("the peer's greeting", hello.as_str(), "ok hello")?;
        Ok(peer)
    }

    /// Stops the peer.
    pub fn dismiss(&mut self) -> Result<(), String> {
        self.ask("quit").map(drop)
    }

    fn ask(&mut self, words: &str) -> Result<String, String> {
        self.asked += 1;
        let asked = format!("{} {words}", self.asked);
        self.xs.write(&format!("{}/ask", self.base), asked.as_bytes()).map_err(say)?;
        self.await_answer(self.asked, LOST * 3)?
            .strip_prefix("ok")
            .map(|rest| rest.trim().to_owned())
            .ok_or_else(|| format!("the peer could not `{words}`"))
    }

    fn await_answer(&mut self, number: u32, patience: Duration) -> Result<String, String> {
        let node = format!("{}/answer", self.base);
        let until = Instant::now() + patience;
        loop {
            let answer = read(&mut self.xs, &node)?;
            if let Some(rest) = answer.strip_prefix(&format!("{number} ")) {
                if let Some(why) = rest.strip_prefix("error ") {
                    return Err(format!("the peer: {why}"));
                }
                return Ok(rest.to_owned());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("no answer from the peer; {node} is {answer:?}"));
            }
            self.xs.wait_event(Some(left)).map_err(say)?;
        }
    }
}

impl Peer for RemotePeer {
    fn id(&self) -> DomId {
        self.id
    }

    fn grant(&mut self, to: DomId, count: usize, access: Access) -> Result<Vec<GrantRef>, String> {
        let write = u8::from(access == Access::ReadWrite);
        let answer = self.ask(&format!("grant {to} {count} {write}"))?;
        answer.split(' ').map(|word| word.parse().map(GrantRef).map_err(say)).collect()
    }

    fn end(&mut self, grefs: &[GrantRef]) -> Result<(), String> {
        let grefs: Vec<String> = grefs.iter().map(ToString::to_string).collect();
        self.ask(&format!("end {}", grefs.join(" "))).map(drop)
    }

    fn write(&mut self, gref: GrantRef, at: usize, bytes: &[u8]) -> Result<(), String> {
        self.ask(&format!("write {gref} {at} {}", hex(bytes))).map(drop)
    }

    fn read(&mut self, gref: GrantRef, at: usize, len: usize) -> Result<Vec<u8>, String> {
        unhex(&self.ask(&format!("read {gref} {at} {len}"))?)
    }

    fn alloc(&mut self, to: DomId) -> Result<Port, String> {
        self.ask(&format!("alloc {to}"))?.parse().map(Port).map_err(say)
    }

    fn notify(&mut self, port: Port, times: u32) -> Result<(), String> {
        self.ask(&format!("notify {port} {times}")).map(drop)
    }

    fn wait(&mut self, port: Port, ms: u32) -> Result<bool, String> {
        Ok(self.ask(&format!("wait {port} {ms}"))? == "1")
    }

    fn close(&mut self, port: Port) -> Result<(), String> {
        self.ask(&format!("close {port}")).map(drop)
    }

    fn forget(&mut self) -> Result<(), String> {
        self.ask("forget").map(drop)
    }
}

/// Executes the commands of the other domain until `quit`.
pub fn serve(domain: XenDomain, base: &str) -> Result<(), String> {
    let mut xs = domain.xenstore().map_err(say)?;
    let mut peer = LocalPeer::new(domain);
    let (ask, answer) = (format!("{base}/ask"), format!("{base}/answer"));
    xs.write(&ask, b"0 ").map_err(say)?;
    xs.watch(&ask, "ask").map_err(say)?;
    xs.write(&answer, b"0 ok hello").map_err(say)?;
    let mut last = "0".to_owned();
    loop {
        xs.wait_event(None).map_err(say)?;
        let asked = read(&mut xs, &ask)?;
        let Some((number, words)) = asked.split_once(' ') else { continue };
        if number == last {
            continue;
        }
        number.clone_into(&mut last);
        let words: Vec<&str> = words.split(' ').collect();
        let said = match obey(&mut peer, &words) {
            Ok(said) => format!("{number} ok {said}"),
            Err(why) => format!("{number} error {why}"),
        };
        xs.write(&answer, said.as_bytes()).map_err(say)?;
        if words == ["quit"] {
            return Ok(());
        }
    }
}

fn obey(peer: &mut LocalPeer, words: &[&str]) -> Result<String, String> {
    let number = |i: usize| -> Result<u32, String> {
        words.get(i).ok_or("a word is missing")?.parse().map_err(say)
    };
    let domain = |i| Ok::<_, String>(DomId(number(i)?.try_into().map_err(say)?));
    let gref = |i| Ok::<_, String>(GrantRef(number(i)?));
    match words {
        ["quit"] => Ok(String::new()),
        ["forget"] => peer.forget().map(|()| String::new()),
        ["grant", _, _, write] => {
            let access = if *write == "1" { Access::ReadWrite } else { Access::ReadOnly };
            let grefs = peer.grant(domain(1)?, number(2)? as usize, access)?;
            Ok(grefs.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
        }
        ["end", ..] => {
            let grefs: Result<Vec<_>, _> = (1..words.len()).map(gref).collect();
            peer.end(&grefs?).map(|()| String::new())
        }
        ["write", _, _, bytes] => {
            peer.write(gref(1)?, number(2)? as usize, &unhex(bytes)?).map(|()| String::new())
        }
        ["read", _, _, _] => {
            Ok(hex(&peer.read(gref(1)?, number(2)? as usize, number(3)? as usize)?))
        }
        ["alloc", _] => Ok(peer.alloc(domain(1)?)?.to_string()),
        ["notify", _, _] => peer.notify(Port(number(1)?), number(2)?).map(|()| String::new()),
        ["wait", _, _] => Ok(u8::from(peer.wait(Port(number(1)?), number(2)?)?).to_string()),
        ["close", _] => peer.close(Port(number(1)?)).map(|()| String::new()),
        _ => Err(format!("no such order: {words:?}")),
    }
}

fn read(xs: &mut Client, node: &str) -> Result<String, String> {
    match xs.read_opt(node) {
        Ok(value) => Ok(String::from_utf8_lossy(&value.unwrap_or_default()).into_owned()),
        Err(error @ XsError::Refused { .. }) if error.is_absent() => Ok(String::new()),
        Err(error) => Err(say(error)),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Result<Vec<u8>, String> {
    let digits = |i| text.get(i..i + 2).ok_or("an odd number of digits");
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(digits(i)?, 16).map_err(say)).collect()
}
