//! Records: structs whose fields are the keys of one directory. Each is declared as one table, from
//! which reading, writing and the list of keys are generated.

use alloc::vec::Vec;

use super::HandshakeError;
use super::encoding::{ANY, Between, Encoding};
use super::fields::{Reader, Writer};
use crate::wire::parse_u32;

/// Declares a struct and the keys of its fields, as `pub field: Type = "key" => Presence(Encoding)`.
/// The keys are read and written in the order of the table. A row may refer to an earlier field by
/// `&field`.
///
/// Fields after `other keys` have no row: their keys are read and written by hand. The list of these
/// keys is given in parentheses.
macro_rules! record {
    (
        $(#[$meta:meta])*
        pub struct $name:ident {
            $($(#[$doc:meta])* pub $field:ident: $type:ty = $key:expr => $kind:expr,)*
        }
        $(other keys($others:expr) {
            $($(#[$other_doc:meta])* pub $other:ident: $other_type:ty,)*
        })?
    ) => {
        $(#[$meta])*
        pub struct $name {
            $($(#[$doc])* pub $field: $type,)*
            $($($(#[$other_doc])* pub $other: $other_type,)*)?
        }

        impl $name {
            /// Every key of the record. `%u` stands for a number.
            pub const KEYS: &'static [&'static str] = {
                const TABLE: &[&str] = &[$($key),*];
                const OTHERS: &[&str] = $crate::handshake::record::first(&[$($others,)? &[]]);
                &$crate::handshake::record::concat::<{ TABLE.len() + OTHERS.len() }>(TABLE, OTHERS)
            };

            fn read_keys(
                r: &mut $crate::handshake::fields::Reader<'_>,
                $($($other: $other_type,)*)?
            ) -> Result<Self, $crate::handshake::HandshakeError> {
                use $crate::handshake::record::Presence as _;
                $(let $field: $type = $kind.read(r, $key)?;)*
                Ok(Self { $($field,)* $($($other,)*)? })
            }
        }

        impl $crate::handshake::record::Record for $name {
            #[allow(clippy::needless_borrow, reason = "rows name values in `read_keys`")]
            fn write_keys(
                &self,
                w: &mut $crate::handshake::fields::Writer<'_>,
            ) -> Result<(), $crate::handshake::HandshakeError> {
                use $crate::handshake::record::Presence as _;
                $(
                    let $field = &self.$field;
                    match $kind.encode($field) {
                        Some(value) => w.put_bytes($key, &value)?,
                        None => w.clear($key)?,
                    }
                )*
                Ok(())
            }
        }
    };
}

/// Gives a record without other fields `read` and `write`.
macro_rules! read_and_write {
    ($name:ident) => {
        impl $name {
            /// Reads the record from a directory, in one transaction.
            ///
            /// # Errors
            /// [`HandshakeError`](crate::handshake::HandshakeError) for the first key that is
            /// missing, malformed or out of bounds.
            pub fn read<X: $crate::Xenstore + ?Sized>(
                xs: &mut X,
                base: &str,
            ) -> Result<Self, $crate::handshake::HandshakeError> {
                $crate::transaction(xs, |tx| {
                    Self::read_keys(&mut $crate::handshake::fields::Reader { xs: tx, base })
                })
            }

            /// Writes the record to a directory, in one transaction, and removes keys of an
            /// earlier one. The state is not changed.
            ///
            /// # Errors
            /// [`HandshakeError`](crate::handshake::HandshakeError).
            pub fn write<X: $crate::Xenstore + ?Sized>(
                &self,
                xs: &mut X,
                base: &str,
            ) -> Result<(), $crate::handshake::HandshakeError> {
                use $crate::handshake::record::Record as _;
                $crate::transaction(xs, |tx| {
                    self.write_keys(&mut $crate::handshake::fields::Writer { xs: tx, base })
                })
            }
        }
    };
}

pub(in crate::handshake) use {read_and_write, record};

/// A struct declared with [`record!`].
pub(super) trait Record {
    /// Writes the keys of the table, and removes those of optional fields without a value.
    fn write_keys(&self, w: &mut Writer<'_>) -> Result<(), HandshakeError>;
}

/// What a missing key means for a field.
pub(super) trait Presence {
    /// The field's type.
    type Field;

    /// Reads the field.
    fn read(self, r: &mut Reader<'_>, key: &str) -> Result<Self::Field, HandshakeError>;

    /// Returns the key's value; `None` if the key is to be removed.
    fn encode(self, field: &Self::Field) -> Option<Vec<u8>>;
}

/// A missing key is an error.
pub(super) struct Required<E>(pub E);

/// A missing key is `None`.
pub(super) struct Optional<E>(pub E);

/// A missing key is this default; the key is always written.
pub(super) struct Or<E: Encoding>(pub E, pub E::Value);

/// A missing key is 0, and 0 is written as a missing key.
pub(super) struct OrZero(pub Between<u32>);

/// A missing key is the number that names the directory: the toolstack did not write it.
pub(super) struct OrName;

impl<E: Encoding> Presence for Required<E> {
    type Field = E::Value;

    fn read(self, r: &mut Reader<'_>, key: &str) -> Result<E::Value, HandshakeError> {
        r.need(key, self.0)
    }

    fn encode(self, field: &E::Value) -> Option<Vec<u8>> {
        Some(self.0.encode(field))
    }
}

impl<E: Encoding> Presence for Optional<E> {
    type Field = Option<E::Value>;

    fn read(self, r: &mut Reader<'_>, key: &str) -> Result<Self::Field, HandshakeError> {
        r.get(key, self.0)
    }

    fn encode(self, field: &Self::Field) -> Option<Vec<u8>> {
        field.as_ref().map(|value| self.0.encode(value))
    }
}

impl<E: Encoding> Presence for Or<E> {
    type Field = E::Value;

    fn read(self, r: &mut Reader<'_>, key: &str) -> Result<E::Value, HandshakeError> {
        Ok(r.get(key, self.0)?.unwrap_or(self.1))
    }

    fn encode(self, field: &E::Value) -> Option<Vec<u8>> {
        Some(self.0.encode(field))
    }
}

impl Presence for OrZero {
    type Field = u32;

    fn read(self, r: &mut Reader<'_>, key: &str) -> Result<u32, HandshakeError> {
        Ok(r.get(key, self.0)?.unwrap_or(0))
    }

    fn encode(self, field: &u32) -> Option<Vec<u8>> {
        (*field > 0).then(|| self.0.encode(field))
    }
}

impl Presence for OrName {
    type Field = u32;

    fn read(self, r: &mut Reader<'_>, key: &str) -> Result<u32, HandshakeError> {
        let name = r.base.rsplit('/').next().unwrap_or_default();
        let by_name = parse_u32(name.as_bytes());
        r.get(key, ANY)?.or(by_name).ok_or_else(|| r.missing(key))
    }

    fn encode(self, field: &u32) -> Option<Vec<u8>> {
        Some(ANY.encode(field))
    }
}

/// Returns the first of several lists.
pub(super) const fn first(lists: &[&'static [&'static str]]) -> &'static [&'static str] {
    match lists {
        [list, ..] => list,
        [] => &[],
    }
}

/// Concatenates two lists of `N` keys in all.
pub(super) const fn concat<const N: usize>(
    table: &[&'static str],
    others: &[&'static str],
) -> [&'static str; N] {
    let mut all = [""; N];
    let (head, tail) = all.split_at_mut(table.len());
    head.copy_from_slice(table);
    tail.copy_from_slice(others);
    all
}
