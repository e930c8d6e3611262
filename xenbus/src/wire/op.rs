macro_rules! ops {
    ($($(#[$doc:meta])* $name:ident = $code:literal,)*) => {
        /// Type of a message: an operation or its response (`enum xsd_sockmsg_type` in
        /// `xs_wire.h`).
        ///
        /// Code 20 (`XS_RESTRICT`) was withdrawn and is never valid.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[repr(u32)]
        pub enum Op {
            $($(#[$doc])* $name = $code,)*
        }

        impl Op {
            /// Every operation, in order of its code.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Returns the operation with this code, if there is one.
            #[must_use]
            pub const fn from_code(code: u32) -> Option<Self> {
                match code {
                    $($code => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

ops! {
    /// Server administration; dom0 only.
    Control = 0,
    /// Lists the children of a node.
    Directory = 1,
    /// Reads a node's value.
    Read = 2,
    /// Reads a node's permissions.
    GetPerms = 3,
    /// Registers a watch.
    Watch = 4,
    /// Removes a watch.
    Unwatch = 5,
    /// Opens a transaction.
    TransactionStart = 6,
    /// Commits or aborts a transaction.
    TransactionEnd = 7,
    /// Introduces a domain to the server; dom0 only.
    Introduce = 8,
    /// Releases a domain; dom0 only.
    Release = 9,
    /// Returns a domain's home path.
    GetDomainPath = 10,
    /// Writes a node's value, creating it and its parents.
    Write = 11,
    /// Creates a node if it does not exist.
    Mkdir = 12,
    /// Removes a node and everything below it.
    Rm = 13,
    /// Replaces a node's permissions.
    SetPerms = 14,
    /// An event, sent by the server without a request.
    WatchEvent = 15,
    /// A rejected request, sent by the server; the payload is an error's name.
    Error = 16,
    /// Returns whether a domain is introduced; dom0 only.
    IsDomainIntroduced = 17,
    /// Re-enables the notification of a domain's shutdown; dom0 only.
    Resume = 18,
    /// Gives one domain the permissions of another; dom0 only.
    SetTarget = 19,
    /// Removes all of the caller's watches and aborts its transactions.
    ResetWatches = 21,
    /// Lists a part of a long list of children.
    DirectoryPart = 22,
    /// Reads the features shown to a domain (newer than Xen 4.17).
    GetFeature = 23,
    /// Sets the features shown to a domain (newer than Xen 4.17).
    SetFeature = 24,
    /// Reads a quota (newer than Xen 4.17).
    GetQuota = 25,
    /// Sets a quota (newer than Xen 4.17).
    SetQuota = 26,
}

impl Op {
    /// Returns the code of this operation on the wire.
    #[must_use]
    pub const fn code(self) -> u32 {
        self as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn op_codes_round_trip_and_code_20_is_rejected() {
        for code in 0..64 {
            match Op::from_code(code) {
                Some(op) => assert_eq!(op.code(), code),
                None => assert!(code == 20 || code > 26),
            }
        }
        assert_eq!(Op::ALL.len(), 26);
        assert_eq!(Op::from_code(0xffff), None);
    }
}
