//! The serialized form of a geometry.

use crate::engine::{Discard, Geometry};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

#[derive(Serialize, Deserialize)]
#[serde(remote = "Geometry")]
pub(in crate::image) struct GeometryFields {
    sectors: u64,
    sector_size: u32,
    physical_sector_size: u32,
    read_only: bool,
    #[serde(with = "discard")]
    discard: Option<Discard>,
    copied: bool,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
struct DiscardFields {
    granularity: u32,
    alignment: u32,
    secure: bool,
}

mod discard {
    use super::*;

    pub fn serialize<S: Serializer>(discard: &Option<Discard>, to: S) -> Result<S::Ok, S::Error> {
        discard
            .map(|Discard { granularity, alignment, secure }| DiscardFields {
                granularity,
                alignment,
                secure,
            })
            .serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Discard>, D::Error> {
        let fields = Option::<DiscardFields>::deserialize(from)?;
        Ok(fields.map(|DiscardFields { granularity, alignment, secure }| Discard {
            granularity,
            alignment,
            secure,
        }))
    }
}
