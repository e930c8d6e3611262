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
