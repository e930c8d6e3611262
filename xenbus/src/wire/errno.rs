use core::fmt;

macro_rules! errnos {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// The errors a server can name (`xsd_errors` in `xs_wire.h`), which travel as text.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum XsErrno {
            $($(#[$doc])* $name,)*
        }

        impl XsErrno {
            /// Every error, in the header's order.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Returns the error's name on the wire, without the terminating NUL.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }

            /// Returns the error with this name, if the protocol defines it.
            #[must_use]
            pub fn from_name(name: &[u8]) -> Option<Self> {
                match name {
                    $(n if n == $text.as_bytes() => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

errnos! {
    /// A malformed request, path or value.
    Inval = "EINVAL",
    /// The caller does not have the permission.
    Acces = "EACCES",
    /// The object already exists.
    Exist = "EEXIST",
    /// The object is a directory.
    IsDir = "EISDIR",
    /// The object does not exist.
    NoEnt = "ENOENT",
    /// Out of memory, or the caller's quota is exceeded.
    NoMem = "ENOMEM",
    /// A quota is exceeded.
    NoSpc = "ENOSPC",
    /// The server failed.
    Io = "EIO",
    /// The directory is not empty.
    NotEmpty = "ENOTEMPTY",
    /// The server does not support this operation.
    NoSys = "ENOSYS",
    /// The connection is read-only.
    RoFs = "EROFS",
    /// The object is in use.
    Busy = "EBUSY",
    /// A transaction met a conflict: retry it.
    Again = "EAGAIN",
    /// Already connected.
    IsConn = "EISCONN",
    /// The response does not fit into one message.
    TooBig = "E2BIG",
    /// Not permitted for this owner.
    Perm = "EPERM",
}

impl fmt::Display for XsErrno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errno_names_round_trip() {
        assert_eq!(XsErrno::ALL.len(), 16);
        for &e in XsErrno::ALL {
            assert_eq!(XsErrno::from_name(e.name().as_bytes()), Some(e));
        }
        assert_eq!(XsErrno::from_name(b"ENOTHING"), None);
        assert_eq!(XsErrno::from_name(b""), None);
    }
}
