//! How errors are shown to an operator.
//!
//! The text of an error says `<what failed>: <why>`. Three things are not part of that text: the
//! errors below it, which [`source`](Error::source) returns and [`Report`] appends; the remedy, which
//! `Remedy::remedy` returns (feature `alloc`); and a stable code, where the type has one.

use core::error::Error;
use core::fmt;

/// An error with the errors that caused it, as `what: cause: cause`.
///
/// ```
/// use pvio_ring::error::Report;
///
/// # #[derive(Debug)]
/// # struct OpenError(std::io::Error);
/// # impl std::fmt::Display for OpenError {
/// #     fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
/// #         f.write_str("disk image /a cannot be opened")
/// #     }
/// # }
/// # impl std::error::Error for OpenError {
/// #     fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
/// #         Some(&self.0)
/// #     }
/// # }
/// let error = OpenError(std::io::Error::other("input/output error"));
/// let text = Report(&error).to_string();
/// assert_eq!(text, "disk image /a cannot be opened: input/output error");
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Report<'a>(pub &'a (dyn Error + 'a));

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

/// An error that reaches an operator.
#[cfg(feature = "alloc")]
pub trait Remedy: Error {
    /// Returns what the operator can do next, in the imperative; `None` if nothing is known.
    fn remedy(&self) -> Option<alloc::borrow::Cow<'static, str>>;
}

/// Returns the variants among `errors` that have no remedy. For the tests of each crate, which list
/// them.
///
/// # Panics
/// If an error's own text contains a remedy after a semicolon, repeats the text of its cause, or ends
/// like a sentence.
#[cfg(feature = "alloc")]
#[doc(hidden)]
#[must_use]
pub fn without_remedy(errors: &[&dyn Remedy]) -> alloc::vec::Vec<alloc::string::String> {
    use alloc::string::ToString;
    let mut none = alloc::vec::Vec::new();
    for error in errors {
        let text = error.to_string();
        assert!(!text.contains("; ") && !text.ends_with('.'), "{text}");
        let remedy = error.remedy();
        assert!(remedy.as_ref().is_none_or(|remedy| !remedy.is_empty()), "{text}");
        if let Some(cause) = error.source() {
            assert!(!text.contains(&alloc::format!(": {cause}")), "{text} has its cause {cause}");
        }
        if remedy.is_none() {
            let debug = alloc::format!("{error:?}");
            none.push(debug.split(|c: char| !c.is_alphanumeric()).next().unwrap_or("").into());
        }
    }
    none
}

/// A peer that violates the protocol, and a record that does not match: nothing for the operator.
#[cfg(feature = "alloc")]
mod no_remedy {
    use super::Remedy;
    use alloc::borrow::Cow;

    impl Remedy for crate::RingFault {
        fn remedy(&self) -> Option<Cow<'static, str>> {
            None
        }
    }

    impl Remedy for crate::inflight::RecordError {
        fn remedy(&self) -> Option<Cow<'static, str>> {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RingFault, ShortSlot};
    use alloc::string::ToString;

    #[derive(Debug, thiserror::Error)]
    enum Layered {
        #[error("the queue cannot start")]
        Outer(#[source] Inner),
    }

    #[derive(Debug, thiserror::Error)]
    #[error("the ring is unusable")]
    struct Inner(#[source] RingFault);

    #[test]
    fn texts_of_the_ring_have_no_remedy() {
        let layout = RingFault::Geometry { bytes: 1, slot_size: 2 };
        let size = crate::inflight::RecordError::Size { found: 1, needed: 2 };
        let version = crate::inflight::RecordError::Version { found: 1, supported: 2 };
        let overflow = RingFault::ProducerOverflow { prod: 1, ahead: 2, most: 3 };
        let none = without_remedy(&[&layout, &overflow, &size, &version]);
        assert_eq!(none, ["Geometry", "ProducerOverflow", "Size", "Version"]);
    }

    #[test]
    fn report_joins_an_error_and_all_its_causes() {
        let fault = RingFault::Geometry { bytes: 3, slot_size: 4 };
        let error = Layered::Outer(Inner(fault));
        let expected = alloc::format!("the queue cannot start: the ring is unusable: {fault}");
        assert_eq!(Report(&error).to_string(), expected);
        assert_eq!(Report(&ShortSlot).to_string(), ShortSlot.to_string());
    }
}
