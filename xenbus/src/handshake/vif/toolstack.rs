//! The keys that the toolstack writes for both sides of a network interface when it creates the
//! device.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use pvio_ring::DomId;

use super::Mac;
use crate::handshake::HandshakeError;
use crate::handshake::common::{
    DeviceAddr, DeviceClass, check_frontend, create_backend_dir, create_frontend_dir,
};
use crate::handshake::encoding::{
    ANY, BYTES, Between, DOMAIN, FLAG, Form, Invalid, PathOf, TEXT, display, text,
};
use crate::handshake::fields::{Reader, Writer};
use crate::handshake::record::{Optional, Or, OrName, Required, read_and_write, record};
use crate::wire::{parse_u32, parse_u64};
use crate::xenstore::{Xenstore, transaction};

/// MTU in bytes: IPv4's minimum, and the maximum that one frame can hold.
const MTU: Between<u32> = Between(68, 65_535);

/// `rate`: limit of the guest's transmit rate.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct VifRate {
    /// Bytes per interval, at least 1.
    pub bytes: u64,
    /// The interval in microseconds, at least 1.
    pub usec: u32,
}

impl VifRate {
    fn parse(text: &[u8]) -> Option<Self> {
        let at = text.iter().position(|&b| b == b',')?;
        let bytes = parse_u64(text.get(..at)?)?;
        let usec = parse_u32(text.get(at.checked_add(1)?..)?)?;
        Some(Self { bytes, usec }).filter(|r| r.bytes > 0 && r.usec > 0)
    }
}

const RATE_FORM: Form<VifRate> = Form(
    |bytes| {
        let expected = "bytes and microseconds with a comma between, neither 0";
        VifRate::parse(bytes).ok_or(Invalid::Form(expected))
    },
    display,
);

impl fmt::Display for VifRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{}", self.bytes, self.usec)
    }
}

/// Returns the path of a backend's rate, which may change while connected and is to be watched.
#[must_use]
pub fn rate_path(backend: &str) -> String {
    format!("{backend}/{RATE}")
}

/// Reads a backend's rate; `None` means no limit.
///
/// # Errors
/// [`HandshakeError`] if it is not `<bytes>,<usec>` with both at least 1 (an invalid limit must not
/// be treated as no limit).
pub fn read_rate<X: Xenstore + ?Sized>(
    mut xs: &mut X,
    backend: &str,
) -> Result<Option<VifRate>, HandshakeError> {
    (Reader { xs: &mut xs, base: backend }).get(RATE, RATE_FORM)
}

/// Returns whether a key of a backend's directory may change while connected; it is then read
/// again.
#[must_use]
pub fn is_live(key: &str) -> bool {
    matches!(key, RATE | OPTIONS)
}

const RATE: &str = "rate";
/// Name of the key with pvio's own options of an interface, for which toolstacks have no keys.
const OPTIONS: &str = "pvio-options";

record! {
    /// The toolstack's keys for an interface's backend.
    #[derive(Clone, PartialEq, Eq, Debug)]
    pub struct ToolstackBack {
        /// `rate`.
        pub rate: Option<VifRate> = RATE => Optional(RATE_FORM),
        /// `frontend-id`: the frontend's domain.
        pub frontend_id: DomId = "frontend-id" => Required(DOMAIN),
        /// `frontend`: the frontend's directory, in the home directory of its domain.
        pub frontend: String = "frontend" => Required(PathOf::domain(&frontend_id)),
        /// `online`: whether the device remains when the frontend closes.
        pub online: bool = "online" => Or(FLAG, false),
        /// `handle`: the number of the interface in the guest.
        pub handle: u32 = "handle" => Required(ANY),
        /// `mac`: the guest's MAC address.
        pub mac: Mac = "mac" => Required(STATION),
        /// `mtu`, in bytes.
        pub mtu: Option<u32> = "mtu" => Optional(MTU),
        /// `bridge`: the bridge to which the host's interface is attached.
        pub bridge: Option<String> = "bridge" => Optional(TEXT),
        /// `script`: path of the script that attaches it.
        pub script: Option<Vec<u8>> = "script" => Optional(BYTES),
        /// `vifname`: name of the host's interface.
        pub vifname: Option<String> = "vifname" => Optional(TEXT),
        /// `type`: `vif`, or `vif_ioemu` if the guest also has an emulated interface for it.
        pub kind: Option<String> = "type" => Optional(TEXT),
        /// `ip`: the guest's IP addresses, separated by spaces.
        pub ip: Option<String> = "ip" => Optional(TEXT),
        /// `pvio-options`: options that only pvio interprets.
        pub options: Option<String> = OPTIONS => Optional(TEXT),
    }
}
read_and_write!(ToolstackBack);

impl ToolstackBack {
    /// Creates the keys of an online interface with this address; all fields can be changed
    /// afterwards.
    #[must_use]
    pub fn new(addr: DeviceAddr, mac: Mac) -> Self {
        Self {
            frontend: addr.frontend_path(),
            frontend_id: addr.front,
            online: true,
            handle: addr.index,
            mac,
            mtu: None,
            bridge: None,
            script: None,
            vifname: None,
            kind: None,
            rate: None,
            ip: None,
            options: None,
        }
    }
}

record! {
    /// The toolstack's keys for an interface's frontend.
    #[derive(Clone, PartialEq, Eq, Debug)]
    pub struct ToolstackFront {
        /// `backend-id`: the backend's domain.
        pub backend_id: DomId = "backend-id" => Required(DOMAIN),
        /// `backend`: the backend's directory, in the home directory of its domain.
        pub backend: String = "backend" => Required(PathOf::domain(&backend_id)),
        /// `handle`: the number of the interface in the guest. QEMU does not write it: it is then
        /// the name of the frontend's directory.
        pub handle: u32 = "handle" => OrName,
        /// `mac`: the MAC address to use.
        pub mac: Mac = "mac" => Required(STATION),
        /// `mtu`, in bytes.
        pub mtu: Option<u32> = "mtu" => Optional(MTU),
        /// `speed`: speed of the link in bits per second; informative only.
        pub speed: Option<u64> = "speed" => Optional(SPEED),
        /// `trusted`: whether the backend may access the frontend's data pages; if not, the
        /// frontend must copy through pages that hold no other data.
        pub trusted: bool = "trusted" => Or(FLAG, true),
    }
}
read_and_write!(ToolstackFront);

impl ToolstackFront {
    /// Returns the keys of a device with this address.
    #[must_use]
    pub fn new(addr: DeviceAddr, mac: Mac) -> Self {
        Self {
            backend: addr.backend_path(),
            backend_id: addr.back,
            handle: addr.index,
            mac,
            mtu: None,
            speed: None,
            trusted: true,
        }
    }
}

/// Creates a network interface: the directories of both sides with their permissions, keys and
/// state [`XenbusState::Initialising`](crate::XenbusState::Initialising), in one transaction. To be called by dom0.
///
/// # Errors
/// [`HandshakeError::Exists`] if either directory exists; [`HandshakeError::Unwritable`] if `back`
/// names another frontend than `addr`, a multicast address or an invalid MTU, or `addr` is not a
/// network interface.
pub fn create_device<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
    back: &ToolstackBack,
) -> Result<(), HandshakeError> {
    let front = ToolstackFront { mtu: back.mtu, ..ToolstackFront::new(addr, back.mac) };
    transaction(xs, |tx| {
        create_frontend_dir(tx, addr, &front)?;
        create_backend(tx, addr, back)
    })
}

/// Creates only the backend's directory of a network interface whose frontend exists: its driver
/// domain died and another one replaces it. The frontend reconnects when the new backend writes its
/// offer.
///
/// # Errors
/// As [`create_device`].
pub fn create_backend<X: Xenstore + ?Sized>(
    xs: &mut X,
    addr: DeviceAddr,
    back: &ToolstackBack,
) -> Result<(), HandshakeError> {
    if addr.class() != DeviceClass::Vif {
        return Err(HandshakeError::Unwritable("a network interface of another class"));
    }
    check_frontend(addr, back.frontend_id, &back.frontend)?;
    if back.mac.is_multicast() || !back.mtu.is_none_or(|mtu| MTU.allows(mtu)) {
        return Err(HandshakeError::Unwritable("an impossible MAC address or MTU"));
    }
    create_backend_dir(xs, addr, back)
}

/// A link's speed as stored in `speed`: a number and a unit, `G`, `M` or `K` bits per second;
/// without a unit it counts as `G`. No header defines it: toolstacks write it for the Windows
/// frontend, whose `xenvif/src/xenvif/mac.c` is the source of this format.
const SPEED: Form<u64> = Form(
    |bytes| {
        let text = text(bytes)?;
        parse_speed(text.as_bytes()).ok_or(Invalid::Form("a number and G, M or K"))
    },
    |speed| {
        // The smallest unit is a kilobit.
        for (unit, name) in [(1_000_000_000, "G"), (1_000_000, "M")] {
            if speed.is_multiple_of(unit) {
                return format!("{}{name}", speed.checked_div(unit).unwrap_or_default()).into();
            }
        }
        format!("{}K", speed.div_ceil(1000)).into()
    },
);

fn parse_speed(text: &[u8]) -> Option<u64> {
    let (digits, unit) = match text.split_last()? {
        (b'g' | b'G', digits) => (digits, 1_000_000_000),
        (b'm' | b'M', digits) => (digits, 1_000_000),
        (b'k' | b'K', digits) => (digits, 1000),
        _ => (text, 1_000_000_000),
    };
    parse_u64(digits)?.checked_mul(unit)
}

/// The MAC address of one station.
const STATION: Form<Mac> = Form(
    |bytes| {
        let mac = text(bytes)?.parse::<Mac>().ok().filter(|mac| !mac.is_multicast());
        mac.ok_or(Invalid::Form("the MAC address of one station"))
    },
    display,
);

/// Reads the link state of an interface's backend (`carrier`); a missing key means up.
///
/// # Errors
/// An error of xenstore; the key is not a number.
pub fn read_carrier<X: Xenstore + ?Sized>(
    mut xs: &mut X,
    backend: &str,
) -> Result<bool, HandshakeError> {
    Reader { xs: &mut xs, base: backend }.flag("carrier", true)
}

/// Writes the link state, for a backend.
///
/// # Errors
/// An error of xenstore.
pub fn write_carrier<X: Xenstore + ?Sized>(
    mut xs: &mut X,
    backend: &str,
    up: bool,
) -> Result<(), HandshakeError> {
    Writer { xs: &mut xs, base: backend }.flag("carrier", up)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handshake::encoding::Encoding as _;

    #[test]
    fn speed_text_parses_and_invalid_speed_is_none() {
        for (text, speed, back) in [
            ("10G", 10_000_000_000, "10G"),
            ("1", 1_000_000_000, "1G"),
            ("100m", 100_000_000, "100M"),
            ("56k", 56_000, "56K"),
            ("2500M", 2_500_000_000, "2500M"),
            ("0G", 0, "0G"),
        ] {
            assert_eq!(parse_speed(text.as_bytes()), Some(speed), "{text}");
            assert_eq!(SPEED.encode(&speed), back.as_bytes());
        }
        for text in ["", "G", "-1G", "1GG", "1T", "1 G", "99999999999999999999G", "18446744074G"] {
            assert_eq!(parse_speed(text.as_bytes()), None, "{text}");
        }
    }
}
