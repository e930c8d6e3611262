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
    DeviceAddr, DeviceClass, create_backend_end, create_frontend_end, regrant_frontend_end,
    write_state,
};
use crate::handshake::fields::{Reader, Writer};
use crate::state::XenbusState;
use crate::wire::{parse_u32, parse_u64};
use crate::xenstore::{Xenstore, transaction};

/// Minimum and maximum MTU, in bytes: IPv4's minimum, and the maximum that one frame can hold.
const MTU: (u32, u32) = (68, 65_535);

/// `rate`: limit of the guest's transmit rate.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Rate {
    /// Bytes per interval, at least 1.
    pub bytes: u64,
    /// The interval in microseconds, at least 1.
    pub usec: u32,
}

impl Rate {
    fn parse(text: &[u8]) -> Option<Self> {
        let at = text.iter().position(|&b| b == b',')?;
        let bytes = parse_u64(text.get(..at)?)?;
        let usec = parse_u32(text.get(at.checked_add(1)?..)?)?;
        Some(Self { bytes, usec }).filter(|r| r.bytes > 0 && r.usec > 0)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{}", self.bytes, self.usec)
    }
}

/// Returns the path of a backend's rate, which may change while connected and is to be watched.
#[must_use]
pub fn rate_path(backend: &str) -> String {
    format!("{backend}/rate")
}

/// Reads a backend's rate; `None` means no limit.
///
/// # Errors
/// [`HandshakeError`] if it is not `<bytes>,<usec>` with both at least 1 (an invalid limit must not
/// be treated as no limit).
pub fn read_rate<X: Xenstore + ?Sized>(
    xs: &mut X,
    backend: &str,
) -> Result<Option<Rate>, HandshakeError> {
    let mut r = Reader { xs, base: backend };
    let Some(text) = r.raw("rate")? else {
        return Ok(None);
    };
    match Rate::parse(&text) {
        Some(rate) => Ok(Some(rate)),
        None => Err(r.malformed(
            "rate",
            &text,
            "bytes and microseconds with a comma between, neither 0",
        )),
    }
}

/// Returns whether a key of a backend's directory may change while connected; it is then read
/// again.
#[must_use]
pub fn is_live(key: &str) -> bool {
    matches!(key, "rate" | OPTIONS)
}

/// Name of the key with pvio's own options of an interface, for which toolstacks have no keys.
const OPTIONS: &str = "pvio-options";

/// The toolstack's keys for an interface's backend.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ToolstackBack {
    /// `frontend`: the frontend's directory.
    pub frontend: String,
    /// `frontend-id`: the frontend's domain.
    pub frontend_id: DomId,
    /// `online`: whether the device remains when the frontend closes.
    pub online: bool,
    /// `handle`: the number of the interface in the guest.
    pub handle: u32,
    /// `mac`: the guest's MAC address.
    pub mac: Mac,
    /// `mtu`, in bytes.
    pub mtu: Option<u32>,
    /// `bridge`: the bridge to which the host's interface is attached.
    pub bridge: Option<String>,
    /// `script`: path of the script that attaches it.
    pub script: Option<Vec<u8>>,
    /// `vifname`: name of the host's interface.
    pub vifname: Option<String>,
    /// `type`: `vif`, or `vif_ioemu` if the guest also has an emulated interface for it.
    pub kind: Option<String>,
    /// `rate`.
    pub rate: Option<Rate>,
    /// `ip`: the guest's IP addresses, separated by spaces.
    pub ip: Option<String>,
    /// `pvio-options`: options that only pvio interprets.
    pub options: Option<String>,
}

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

    /// Reads a backend's directory.
    ///
    /// # Errors
    /// [`HandshakeError`], also if the frontend's path is not in the home directory of its domain.
    pub fn read<X: Xenstore + ?Sized>(xs: &mut X, base: &str) -> Result<Self, HandshakeError> {
        transaction(xs, |tx| {
            let rate = read_rate(tx, base)?;
            let mut r = Reader { xs: tx, base };
            let frontend_id = r.domid("frontend-id")?;
            Ok(Self {
                frontend: r.peer_path("frontend", frontend_id)?,
                frontend_id,
                online: r.flag("online", false)?,
                handle: r.need_u32("handle", 0, u32::MAX)?,
                mac: read_mac(&mut r)?,
                mtu: r.opt_u32("mtu", MTU.0, MTU.1)?,
                bridge: r.opt_text("bridge")?,
                script: r.opt_bytes("script")?,
                vifname: r.opt_text("vifname")?,
                kind: r.opt_text("type")?,
                ip: r.opt_text("ip")?,
                options: r.opt_text(OPTIONS)?,
                rate,
            })
        })
    }

    /// Writes a backend's directory, without its state.
    ///
    /// # Errors
    /// [`HandshakeError`].
    pub fn write<X: Xenstore + ?Sized>(
        &self,
        xs: &mut X,
        base: &str,
    ) -> Result<(), HandshakeError> {
        transaction(xs, |tx| {
            let mut w = Writer { xs: tx, base };
            w.put("frontend", &self.frontend)?;
            w.put("frontend-id", self.frontend_id)?;
            w.flag("online", self.online)?;
            w.put("handle", self.handle)?;
            w.put("mac", self.mac)?;
            w.opt("mtu", self.mtu)?;
            w.opt("bridge", self.bridge.as_ref())?;
            w.opt_bytes("script", self.script.as_deref())?;
            w.opt("vifname", self.vifname.as_ref())?;
            w.opt("type", self.kind.as_ref())?;
            w.opt("rate", self.rate)?;
            w.opt("ip", self.ip.as_ref())?;
            w.opt(OPTIONS, self.options.as_ref())
        })
    }
}

/// The toolstack's keys for an interface's frontend.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ToolstackFront {
    /// `backend`: the backend's directory.
    pub backend: String,
    /// `backend-id`: the backend's domain.
    pub backend_id: DomId,
    /// `handle`: the number of the interface in the guest. QEMU does not write it: it is then the
    /// name of the frontend's directory.
    pub handle: u32,
    /// `mac`: the MAC address to use.
    pub mac: Mac,
    /// `mtu`, in bytes.
    pub mtu: Option<u32>,
    /// `speed`: speed of the link in bits per second; informative only.
    pub speed: Option<u64>,
    /// `trusted`: whether the backend may access the frontend's data pages; if not, the frontend
    /// must copy through pages that hold no other data.
    pub trusted: bool,
}

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

    /// Reads a frontend's directory.
    ///
    /// # Errors
    /// [`HandshakeError`], also if the backend's path is not in the home directory of its domain.
    pub fn read<X: Xenstore + ?Sized>(xs: &mut X, base: &str) -> Result<Self, HandshakeError> {
        transaction(xs, |tx| {
            let mut r = Reader { xs: tx, base };
            let backend_id = r.domid("backend-id")?;
            Ok(Self {
                backend: r.peer_path("backend", backend_id)?,
                backend_id,
                handle: r.number_of_device("handle")?,
                mac: read_mac(&mut r)?,
                mtu: r.opt_u32("mtu", MTU.0, MTU.1)?,
                speed: read_speed(&mut r)?,
                trusted: r.flag("trusted", true)?,
            })
        })
    }

    /// Writes a frontend's directory, without its state.
    ///
    /// # Errors
    /// [`HandshakeError`].
    pub fn write<X: Xenstore + ?Sized>(
        &self,
        xs: &mut X,
        base: &str,
    ) -> Result<(), HandshakeError> {
        transaction(xs, |tx| {
            let mut w = Writer { xs: tx, base };
            w.put("backend", &self.backend)?;
            w.put("backend-id", self.backend_id)?;
            w.put("handle", self.handle)?;
            w.put("mac", self.mac)?;
            w.opt("mtu", self.mtu)?;
            w.opt("speed", self.speed.map(Speed))?;
            w.flag("trusted", self.trusted)
        })
    }
}

/// Creates a network interface: the directories of both sides with their permissions, keys and
/// state [`XenbusState::Initialising`], in one transaction. To be called by dom0.
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
        create_frontend_end(tx, addr)?;
        create_backend(tx, addr, back)?;
        front.write(tx, &addr.frontend_path())?;
        write_state(tx, &addr.frontend_path(), XenbusState::Initialising)
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
    if back.frontend_id != addr.front || back.frontend != addr.frontend_path() {
        return Err(HandshakeError::Unwritable("the frontend is not the address's"));
    }
    if back.mac.is_multicast() || back.mtu.is_some_and(|mtu| mtu < MTU.0 || mtu > MTU.1) {
        return Err(HandshakeError::Unwritable("an impossible MAC address or MTU"));
    }
    transaction(xs, |tx| {
        create_backend_end(tx, addr)?;
        regrant_frontend_end(tx, addr)?;
        back.write(tx, &addr.backend_path())?;
        write_state(tx, &addr.backend_path(), XenbusState::Initialising)
    })
}

/// A link's speed as stored in `speed`: a number and a unit, `G`, `M` or `K` bits per second;
/// without a unit it counts as `G`. No header defines it: toolstacks write it for the Windows
/// frontend, whose `xenvif/src/xenvif/mac.c` is the source of this format.
struct Speed(u64);

impl Speed {
    fn parse(text: &str) -> Option<u64> {
        let (digits, unit) = match text.as_bytes().split_last()? {
            (b'g' | b'G', digits) => (digits, 1_000_000_000),
            (b'm' | b'M', digits) => (digits, 1_000_000),
            (b'k' | b'K', digits) => (digits, 1000),
            _ => (text.as_bytes(), 1_000_000_000),
        };
        parse_u64(digits)?.checked_mul(unit)
    }
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The smallest unit is a kilobit.
        for (unit, name) in [(1_000_000_000, "G"), (1_000_000, "M")] {
            if self.0.is_multiple_of(unit) {
                return write!(f, "{}{name}", self.0.checked_div(unit).unwrap_or_default());
            }
        }
        write!(f, "{}K", self.0.div_ceil(1000))
    }
}

fn read_speed<X: Xenstore + ?Sized>(r: &mut Reader<'_, X>) -> Result<Option<u64>, HandshakeError> {
    let Some(text) = r.opt_text("speed")? else { return Ok(None) };
    match Speed::parse(&text) {
        Some(speed) => Ok(Some(speed)),
        None => Err(r.malformed("speed", text.as_bytes(), "a number and G, M or K")),
    }
}

/// Reads the link state of an interface's backend (`carrier`); a missing key means up.
///
/// # Errors
/// An error of xenstore; the key is not a number.
pub fn read_carrier<X: Xenstore + ?Sized>(
    xs: &mut X,
    backend: &str,
) -> Result<bool, HandshakeError> {
    Reader { xs, base: backend }.flag("carrier", true)
}

/// Writes the link state, for a backend.
///
/// # Errors
/// An error of xenstore.
pub fn write_carrier<X: Xenstore + ?Sized>(
    xs: &mut X,
    backend: &str,
    up: bool,
) -> Result<(), HandshakeError> {
    Writer { xs, base: backend }.flag("carrier", up)
}

fn read_mac<X: Xenstore + ?Sized>(r: &mut Reader<'_, X>) -> Result<Mac, HandshakeError> {
    let text = r.need_text("mac")?;
    match text.parse::<Mac>() {
        Ok(mac) if !mac.is_multicast() => Ok(mac),
        _ => Err(r.malformed("mac", text.as_bytes(), "the MAC address of one station")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn speeds_and_what_is_none() {
        for (text, speed, back) in [
            ("10G", 10_000_000_000, "10G"),
            ("1", 1_000_000_000, "1G"),
            ("100m", 100_000_000, "100M"),
            ("56k", 56_000, "56K"),
            ("2500M", 2_500_000_000, "2500M"),
            ("0G", 0, "0G"),
        ] {
            assert_eq!(Speed::parse(text), Some(speed), "{text}");
            assert_eq!(Speed(speed).to_string(), back);
        }
        for text in ["", "G", "-1G", "1GG", "1T", "1 G", "99999999999999999999G", "18446744074G"] {
            assert_eq!(Speed::parse(text), None, "{text}");
        }
    }
}
