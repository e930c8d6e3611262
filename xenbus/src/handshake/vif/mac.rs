use core::fmt;
use core::str::FromStr;

/// A MAC address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Mac(pub [u8; 6]);

/// The text is not six pairs of hexadecimal digits separated by colons.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not a MAC address: expected six pairs of hexadecimal digits with colons between")]
pub struct MacError;

impl Mac {
    /// Returns whether it is a multicast address, which no interface can have.
    #[must_use]
    pub const fn is_multicast(self) -> bool {
        let [first, ..] = self.0;
        first & 1 != 0
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let mut pairs = text.split(':');
        let mut bytes = [0_u8; 6];
        for byte in &mut bytes {
            let pair = pairs.next().ok_or(MacError)?;
            // `from_str_radix` would accept a sign.
            if pair.len() != 2 || !pair.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(MacError);
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| MacError)?;
        }
        if pairs.next().is_some() { Err(MacError) } else { Ok(Self(bytes)) }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use proptest::prelude::*;

    #[test]
    fn malformed_mac_address_is_rejected() {
        for bad in [
            "",
            "00:16:3e:00:00",
            "00:16:3e:00:00:00:00",
            "00-16-3e-00-00-00",
            "0:16:3e:00:00:00",
            "+0:16:3e:00:00:00",
            "00:16:3e:00:00:0g",
            "00:16:3e:00:00:00 ",
            "éa:16:3e:00:00:00",
        ] {
            assert_eq!(bad.parse::<Mac>(), Err(MacError), "{bad}");
        }
        assert!("01:00:5e:00:00:01".parse::<Mac>().unwrap().is_multicast());
        assert_eq!("00:16:3E:Ab:cD:ef".parse::<Mac>().unwrap().to_string(), "00:16:3e:ab:cd:ef");
    }

    proptest! {
        #[test]
        fn mac_address_text_round_trips(bytes: [u8; 6]) {
            prop_assert_eq!(Mac(bytes).to_string().parse::<Mac>(), Ok(Mac(bytes)));
        }
    }
}
