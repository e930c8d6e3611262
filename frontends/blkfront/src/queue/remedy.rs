//! What the guest's operator can do about an error of a queue.

use super::{BackendFault, SetupError};
use alloc::borrow::Cow;
use pvio_ring::error::Remedy;

impl Remedy for BackendFault {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        // A backend that violates the protocol: nothing for the guest's operator.
        None
    }
}

impl Remedy for SetupError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        let remedy = match self {
            Self::Grant(error) => error.remedy(),
            Self::Event(error) => error.remedy(),
            Self::Ring(_) => None,
        };
        remedy.map(Cow::Borrowed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pvio_event_channel::EventError;
    use pvio_grant_table::GrantError;
    use pvio_ring::RingFault;
    use pvio_ring::error::without_remedy;

    #[test]
    fn errors_have_a_remedy_or_are_listed() {
        let fault = RingFault::Geometry { bytes: 1, slot_size: 2 };
        let none = without_remedy(&[
            &BackendFault::UnknownId(1),
            &SetupError::Grant(GrantError::OutOfEntries),
            &SetupError::Event(EventError::NoPorts),
            &SetupError::Ring(fault),
        ]);
        assert_eq!(none, ["UnknownId", "Ring"]);
    }
}
