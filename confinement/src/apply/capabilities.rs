//! Capability sets and `no_new_privs`.

use crate::applied::Outcome;
use rustix::io::Errno;
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capability_is_in_bounding_set,
    clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_capabilities_secure_bits, set_no_new_privs,
};

/// Empties the bounding set. Also takes the special treatment of user 0 away, irreversibly, so that
/// a program started by root gets no capabilities either.
pub fn empty_bounding_set() -> Outcome {
    let emptied = || -> Result<String, (&str, Errno)> {
        let bits = CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
        set_capabilities_secure_bits(bits).map_err(|e| ("PR_SET_SECUREBITS", e))?;
        // A kernel may have more capabilities than this program has names: each number is tried.
        for capability in (0..u64::BITS).map(|bit| CapabilitySet::from_bits_retain(1 << bit)) {
            match capability_is_in_bounding_set(capability) {
                Ok(true) => remove_capability_from_bounding_set(capability)
                    .map_err(|e| ("PR_CAPBSET_DROP", e))?,
                Ok(false) => {}
                // Beyond the last capability.
                Err(_) => break,
            }
        }
        Ok(String::new())
    };
    Outcome::of(emptied())
}

/// Empties the effective, permitted, inheritable and ambient sets.
pub fn clear() -> Outcome {
    let cleared = || -> Result<String, (&str, Errno)> {
        match clear_ambient_capability_set() {
            // Kernels before 4.3 have no ambient set.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(error) => return Err(("PR_CAP_AMBIENT_CLEAR_ALL", error)),
        }
        let none = CapabilitySet::empty();
        let none = CapabilitySets { effective: none, permitted: none, inheritable: none };
        set_capabilities(None, none).map_err(|e| ("capset", e))?;
        Ok(String::new())
    };
    Outcome::of(cleared())
}

/// Sets `no_new_privs`.
pub fn forbid_new() -> Outcome {
    Outcome::of(set_no_new_privs(true).map(|()| "").map_err(|e| ("PR_SET_NO_NEW_PRIVS", e)))
}
