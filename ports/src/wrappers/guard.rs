//! A filter of source addresses: drops packets that a guest sends with addresses that are not its
//! own.
//!
//! | header | checked with `mac` | also checked with `ip` |
//! |---|---|---|
//! | Ethernet | the source is the vif's | only ARP, IPv4 and IPv6, without VLAN tags |
//! | ARP | the sender's hardware address is the vif's | the sender's IP is the vif's, or none (a probe) |
//! | IPv4 | – | the source is the vif's, or 0.0.0.0 in a DHCP request |
//! | IPv6 | – | the source is the vif's, the link-local address of its MAC, or `::` for ICMPv6 |
//! | neighbour discovery | every link-layer address is the vif's | the vif's address only; no router, no redirect |
//!
//! Neighbour discovery in fragments, or after more extension headers than real hosts send, is
//! dropped, since it cannot be validated (RFC 6980).
#![forbid(unsafe_code)]

use super::inspect::{Inspected, Inspector};
use crate::{NetPort, Offload};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::net::{IpAddr, Ipv6Addr};
use core::str::FromStr;
use pvio_netback::fault::DropReason;
use pvio_ring::proto::checksum::ETHERNET_HEADER;
use pvio_ring::proto::headers::{Arp, ether_type};
use pvio_runtime::Setting;
use zerocopy::FromBytes;

/// Addresses that a guest may use as a sender. The default allows all.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Rules {
    /// The only MAC address that it may use.
    pub mac: Option<[u8; 6]>,
    /// The IP addresses that it may use.
    pub addresses: Option<Vec<Network>>,
}

/// IP address or network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Network {
    /// Any address of the network.
    pub address: IpAddr,
    /// Prefix length in bits.
    pub prefix: u8,
}

/// Error: not an IP address with an optional prefix length.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not an IP address, or one with a prefix length")]
pub struct NotANetwork;

impl FromStr for Network {
    type Err = NotANetwork;

    fn from_str(text: &str) -> Result<Self, NotANetwork> {
        let (address, prefix) = match text.split_once('/') {
            None => (text, None),
            Some((address, prefix)) => (address, Some(prefix)),
        };
        let address: IpAddr = address.parse().map_err(|_| NotANetwork)?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.map_or(Ok(most), str::parse).map_err(|_| NotANetwork)?;
        Some(Self { address, prefix }).filter(|n| n.prefix <= most).ok_or(NotANetwork)
    }
}

impl Network {
    /// Whether the network contains the address.
    #[must_use]
    pub fn has(&self, other: IpAddr) -> bool {
        let (ours, theirs, bits) = match (self.address, other) {
            (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits().into(), b.to_bits().into(), 32_u32),
            (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits(), b.to_bits(), 128),
            _ => return false,
        };
        let free = bits.saturating_sub(u32::from(self.prefix));
        let (ours, theirs): (u128, u128) = (ours, theirs);
        ours.checked_shr(free).unwrap_or(0) == theirs.checked_shr(free).unwrap_or(0)
    }
}

/// Offset of the packet in a frame without a VLAN tag.
const PACKET: usize = ETHERNET_HEADER;

impl Rules {
    /// Checks a frame.
    ///
    /// # Errors
    /// The reason to drop it.
    pub fn check(&self, frame: &[u8]) -> Result<(), DropReason> {
        let Some(mac) = self.mac else { return Ok(()) };
        if bytes::<6>(frame, 6) != Some(mac) {
            return Err(DropReason::TxSpoofMac);
        }
        let packet = frame.get(PACKET..).unwrap_or_default();
        match bytes(frame, 12).map_or(0, u16::from_be_bytes) {
            ether_type::ARP => self.arp(packet, mac).ok_or(DropReason::TxSpoofArp),
            ether_type::IPV4 => self.ipv4(packet).ok_or(DropReason::TxSpoofIp),
            ether_type::IPV6 => self.ipv6(packet, mac),
            _ if self.addresses.is_some() => Err(DropReason::TxSpoofProtocol),
            _ => Ok(()),
        }
    }

    fn may_be(&self, address: IpAddr) -> bool {
        self.addresses.as_ref().is_none_or(|all| all.iter().any(|one| one.has(address)))
    }

    fn arp(&self, packet: &[u8], mac: [u8; 6]) -> Option<()> {
        let (arp, _) = Arp::ref_from_prefix(packet).ok()?;
        let protocol = arp.sender_protocol;
        let ours = protocol == [0; 4] || self.may_be(IpAddr::from(protocol));
        (arp.is_ipv4_over_ethernet() && arp.sender_hardware == mac && ours).then_some(())
    }

    fn ipv4(&self, packet: &[u8]) -> Option<()> {
        if self.addresses.is_none() {
            return Some(());
        }
        let source = bytes::<4>(packet, 12)?;
        if source != [0; 4] {
            return self.may_be(IpAddr::from(source)).then_some(());
        }
        // A host without an address requests one by DHCP: UDP to port 67, not fragmented.
        let [first, ..] = *packet else { return None };
        let header = usize::from(first & 15).saturating_mul(4);
        let whole = u16::from_be_bytes(bytes(packet, 6)?) & 0x3fff == 0;
        let to = u16::from_be_bytes(bytes(packet, header.saturating_add(2))?);
        (header >= 20 && whole && bytes(packet, 9)? == [17] && to == 67).then_some(())
    }

    fn ipv6(&self, packet: &[u8], mac: [u8; 6]) -> Result<(), DropReason> {
        let source = bytes::<16>(packet, 8).ok_or(DropReason::TxSpoofIp)?;
        let next = bytes::<1>(packet, 6).ok_or(DropReason::TxSpoofIp)?;
        let message = icmp(packet, next[0])?;
        let none = source == [0; 16] && message.is_some();
        if self.addresses.is_some() && !none && !self.is_own(source, mac) {
            return Err(DropReason::TxSpoofIp);
        }
        let Some(message) = message else { return Ok(()) };
        self.neighbour(message, mac).ok_or(DropReason::TxSpoofNeighbour)
    }

    /// Checks an ICMPv6 message: neighbour discovery (RFC 4861) may only announce this vif's
    /// addresses.
    fn neighbour(&self, message: &[u8], mac: [u8; 6]) -> Option<()> {
        const ROUTER_SOLICITATION: u8 = 133;
        const ROUTER_ADVERTISEMENT: u8 = 134;
        const SOLICITATION: u8 = 135;
        const ADVERTISEMENT: u8 = 136;
        const REDIRECT: u8 = 137;
        let strict = self.addresses.is_some();
        let [kind] = bytes::<1>(message, 0)?;
        let options = match kind {
            ROUTER_SOLICITATION => 8,
            SOLICITATION => 24,
            ROUTER_ADVERTISEMENT if !strict => 16,
            REDIRECT if !strict => 40,
            ADVERTISEMENT => {
                let target = bytes::<16>(message, 8)?;
                if strict && !self.is_own(target, mac) {
                    return None;
                }
                24
            }
            ROUTER_ADVERTISEMENT | REDIRECT => return None,
            _ => return Some(()),
        };
        let mut options = message.get(options..)?;
        while !options.is_empty() {
            let [kind, units] = bytes::<2>(options, 0)?;
            // Source and target link-layer address options. The target of a redirect is another
            // host's address.
            if matches!(kind, 1 | 2) && kind_is_own(kind, bytes(message, 0)?) {
                (bytes::<6>(options, 2)? == mac).then_some(())?;
            }
            if units == 0 {
                return None;
            }
            options = options.get(usize::from(units).saturating_mul(8)..)?;
        }
        Some(())
    }

    fn is_own(&self, address: [u8; 16], mac: [u8; 6]) -> bool {
        address == link_local(mac) || self.may_be(IpAddr::from(Ipv6Addr::from(address)))
    }
}

/// Whether the link-layer address of the option must be the sender's own.
const fn kind_is_own(option: u8, message: [u8; 1]) -> bool {
    !(option == 2 && message[0] == 137)
}

/// Returns the link-local address that is derived from a MAC address (RFC 4291, appendix A).
const fn link_local([a, b, c, d, e, f]: [u8; 6]) -> [u8; 16] {
    [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f]
}

/// Returns the ICMPv6 message of an IPv6 packet, if it contains one.
fn icmp(packet: &[u8], mut next: u8) -> Result<Option<&[u8]>, DropReason> {
    const EXTENSIONS: usize = 8;
    let unreadable = DropReason::TxSpoofNeighbour;
    let mut rest = packet.get(40..).unwrap_or_default();
    let mut fragment = false;
    for _ in 0..EXTENSIONS {
        let units = match next {
            58 if fragment => return Err(unreadable),
            58 => return Ok(Some(rest)),
            // Hop-by-hop, routing, destination options; fragment; authentication.
            0 | 43 | 60 => bytes(rest, 1).map(|n| length(n, 8)),
            44 => Some(8),
            51 => bytes(rest, 1).map(|n| length(n, 4)),
            _ => return Ok(None),
        };
        // After a fragment header, the data of later fragments cannot be parsed as headers.
        fragment |= next == 44;
        let after = units.and_then(|units| Some((bytes::<1>(rest, 0)?, rest.get(units..)?)));
        let ([kind], tail) = after.ok_or(unreadable)?;
        (next, rest) = (kind, tail);
    }
    Err(unreadable)
}

/// Returns the size in bytes of an extension header whose length field counts units after the first
/// eight bytes.
fn length([units]: [u8; 1], unit: usize) -> usize {
    usize::from(units).saturating_mul(unit).saturating_add(8)
}

fn bytes<const N: usize>(from: &[u8], at: usize) -> Option<[u8; N]> {
    from.get(at..)?.first_chunk().copied()
}

/// Rules of a vif, shared by the guards of its queues.
#[derive(Clone, Debug)]
pub struct Guards(Arc<Setting<Rules>>);

impl Default for Guards {
    fn default() -> Self {
        Self(Setting::new(Rules::default()))
    }
}

impl Guards {
    /// Replaces the rules.
    pub fn set(&self, rules: Rules) {
        self.0.set(rules);
    }

    /// Returns the current rules.
    #[must_use]
    pub fn rules(&self) -> Rules {
        (*self.0.get()).clone()
    }

    /// Returns a wrapper of `port` that applies the rules.
    pub fn wrap<N: NetPort>(&self, port: N) -> Guard<N> {
        Guard::new(port, &self.0)
    }
}

/// Port through which a guest can send only under its own addresses.
pub type Guard<N> = Inspected<N, Rules>;

impl Inspector for Rules {
    fn sent(&self, frame: &[u8], _offload: Offload) -> Result<(), DropReason> {
        self.check(frame)
    }
}
