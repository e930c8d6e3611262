//! The nine states of one side of a xenbus device (`enum xenbus_state` in `io/xenbus.h`).

use core::fmt;

use crate::wire::parse_u32;

/// State of one side of a device; each side writes its own and watches its peer's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
#[repr(u8)]
pub enum XenbusState {
    /// 0: there is no state, or an invalid one.
    #[default]
    Unknown = 0,
    /// 1: the toolstack created the device, or this side restarts.
    Initialising = 1,
    /// 2: the backend has written its offer.
    InitWait = 2,
    /// 3: the frontend has written its request.
    Initialised = 3,
    /// 4: the device is in use.
    Connected = 4,
    /// 5: this side is about to stop.
    Closing = 5,
    /// 6: this side has stopped and uses no resources of its peer.
    Closed = 6,
    /// 7: this side changes its configuration.
    Reconfiguring = 7,
    /// 8: this side has changed its configuration.
    Reconfigured = 8,
}

impl XenbusState {
    /// Every state, in order of its number.
    pub const ALL: [Self; 9] = [
        Self::Unknown,
        Self::Initialising,
        Self::InitWait,
        Self::Initialised,
        Self::Connected,
        Self::Closing,
        Self::Closed,
        Self::Reconfiguring,
        Self::Reconfigured,
    ];

    /// Returns the state with this number; [`XenbusState::Unknown`] beyond 8.
    #[must_use]
    pub fn from_number(number: u32) -> Self {
        usize::try_from(number).ok().and_then(|n| Self::ALL.get(n).copied()).unwrap_or_default()
    }

    /// Parses a state that a peer wrote, optionally followed by a NUL or a line end. A missing
    /// value, a value that is not a decimal number, or a number beyond 8 is
    /// [`XenbusState::Unknown`].
    #[must_use]
    pub fn parse(text: Option<&[u8]>) -> Self {
        let text = match text {
            Some([number @ .., b'\0' | b'\n']) => Some(number),
            other => other,
        };
        text.and_then(parse_u32).map_or(Self::Unknown, Self::from_number)
    }

    /// Returns the state's number on the wire.
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// Returns the state as text, for xenstore.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Unknown => "0",
            Self::Initialising => "1",
            Self::InitWait => "2",
            Self::Initialised => "3",
            Self::Connected => "4",
            Self::Closing => "5",
            Self::Closed => "6",
            Self::Reconfiguring => "7",
            Self::Reconfigured => "8",
        }
    }
}

/// Prints the state's name as in the header, without `XenbusState`.
impl fmt::Display for XenbusState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Unknown => "Unknown",
            Self::Initialising => "Initialising",
            Self::InitWait => "InitWait",
            Self::Initialised => "Initialised",
            Self::Connected => "Connected",
            Self::Closing => "Closing",
            Self::Closed => "Closed",
            Self::Reconfiguring => "Reconfiguring",
            Self::Reconfigured => "Reconfigured",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xenbus_state_text_round_trips_and_invalid_text_is_unknown() {
        for state in XenbusState::ALL {
            assert_eq!(XenbusState::parse(Some(state.text().as_bytes())), state);
            assert_eq!(XenbusState::from_number(u32::from(state.number())), state);
        }
        for bad in [&b""[..], b"9", b"-1", b"4 ", b"Connected", b"\xff", b"99999999999999999999"] {
            assert_eq!(XenbusState::parse(Some(bad)), XenbusState::Unknown);
        }
        assert_eq!(XenbusState::parse(None), XenbusState::Unknown);
        assert_eq!(XenbusState::parse(Some(b"4\0")), XenbusState::Connected);
        assert_eq!(XenbusState::parse(Some(b"4\n\n")), XenbusState::Unknown);
    }
}
