//! Distribution of received packets over a guest's queues, as the guest configured it over the control
//! ring.

use pvio_ring::proto::netif::{
    CtrlStatus, HASH_KEY_MAX, HASH_NONE, HASH_TOEPLITZ, HashKind, HashTypes, hash_frame,
};

/// Largest number of entries of a guest's mapping (Linux: `XEN_NETBK_MAX_HASH_MAPPING_SIZE`).
pub const HASH_MAPPING_MAX: usize = 128;

/// Hash of a packet, as reported to the guest.
pub(super) type Hash = (HashKind, u32);

/// Hash configuration of a guest. Initially no packet is hashed.
#[derive(Clone, Debug)]
pub(super) struct HashConfig {
    toeplitz: bool,
    types: HashTypes,
    key: [u8; HASH_KEY_MAX],
    /// Number of valid entries of the mapping. If 0, the queue is the hash modulo the number of queues.
    size: usize,
    /// Queue number for each hash modulo `size`. Every entry is a valid queue number.
    mapping: [usize; HASH_MAPPING_MAX],
    queues: usize,
}

impl HashConfig {
    pub const fn new(queues: usize) -> Self {
        let (key, mapping) = ([0; HASH_KEY_MAX], [0; HASH_MAPPING_MAX]);
        Self { toeplitz: false, types: HashTypes::empty(), key, size: 0, mapping, queues }
    }

    /// Number of 64-bit values that it takes in the in-flight record.
    pub const WORDS: usize = 3 + HASH_KEY_MAX / 8 + HASH_MAPPING_MAX;

    /// Returns the configuration as 64-bit values for the in-flight record.
    pub fn words(&self) -> impl Iterator<Item = u64> {
        let Self { toeplitz, types, key, size, mapping, .. } = self;
        let (key, _) = key.as_chunks();
        let key = key.iter().map(|word| u64::from_le_bytes(*word));
        let mapping = mapping.iter().map(|queue| *queue as u64);
        [u64::from(*toeplitz), types.bits().into(), *size as u64]
            .into_iter()
            .chain(key)
            .chain(mapping)
    }

    /// Returns the configuration stored as these values, or `None` if a guest cannot have set it.
    pub fn from_words(mut word: impl FnMut() -> u64, queues: usize) -> Option<Self> {
        let mut config = Self::new(queues);
        config.toeplitz = word() != 0;
        config.types = HashTypes::from_bits(u32::try_from(word()).ok()?)?;
        config.size = usize::try_from(word()).ok().filter(|size| *size <= HASH_MAPPING_MAX)?;
        let (key, _) = config.key.as_chunks_mut();
        key.iter_mut().for_each(|part| *part = word().to_le_bytes());
        for queue in &mut config.mapping {
            *queue = usize::try_from(word()).ok().filter(|queue| *queue < queues)?;
        }
        Some(config)
    }

    /// Whether packets are hashed. If not, they stay with the queue that received them.
    pub const fn is_active(&self) -> bool {
        self.toeplitz && !self.types.is_empty()
    }

    /// Returns a packet's hash, if its type is one that the guest has enabled, and the queue that it is
    /// steered to. A packet without a hash is steered as if its hash were 0 (as in Linux).
    pub fn steer(&self, frame: &[u8]) -> (Option<Hash>, usize) {
        let hash = hash_frame(frame, self.types, &self.key);
        let value = hash.map_or(0, |(_, value)| value as usize);
        let queue = match value.checked_rem(self.size) {
            Some(at) => self.mapping.get(at).copied().unwrap_or_default(),
            None => value.checked_rem(self.queues).unwrap_or_default(),
        };
        (hash, queue)
    }

    pub const fn set_algorithm(&mut self, algorithm: u32) -> CtrlStatus {
        self.toeplitz = match algorithm {
            HASH_NONE => false,
            HASH_TOEPLITZ => true,
            _ => return CtrlStatus::InvalidParameter,
        };
        CtrlStatus::Success
    }

    pub const fn types_there_are(&self) -> Result<u32, CtrlStatus> {
        if self.toeplitz { Ok(HashTypes::all().bits()) } else { Err(CtrlStatus::NotSupported) }
    }

    pub const fn set_types(&mut self, types: u32) -> CtrlStatus {
        match HashTypes::from_bits(types) {
            Some(types) if self.toeplitz => self.types = types,
            _ => return CtrlStatus::InvalidParameter,
        }
        CtrlStatus::Success
    }

    /// Sets the key. Missing bytes at its end are 0.
    pub fn set_key(&mut self, key: &[u8]) -> CtrlStatus {
        let mut whole = [0; HASH_KEY_MAX];
        let Some(part) = whole.get_mut(..key.len()) else { return CtrlStatus::BufferOverflow };
        part.copy_from_slice(key);
        self.key = whole;
        CtrlStatus::Success
    }

    /// Sets the size of the mapping; all entries become 0.
    pub fn set_mapping_size(&mut self, size: u32) -> CtrlStatus {
        match usize::try_from(size) {
            Ok(size) if size <= HASH_MAPPING_MAX => self.size = size,
            _ => return CtrlStatus::InvalidParameter,
        }
        self.mapping = [0; HASH_MAPPING_MAX];
        CtrlStatus::Success
    }

    /// Whether a range lies within the mapping (XSA-270: the sum may wrap, and the limit is the size
    /// that the guest has set, not the capacity of the array).
    pub fn holds(&self, offset: u32, len: u32) -> bool {
        let end = offset.checked_add(len).and_then(|end| usize::try_from(end).ok());
        end.is_some_and(|end| end <= self.size)
    }

    /// Sets a range of the mapping, either completely or not at all.
    pub fn set_mapping(&mut self, offset: u32, part: &[u32]) -> CtrlStatus {
        let len = u32::try_from(part.len()).unwrap_or(u32::MAX);
        let good = |queue: &u32| usize::try_from(*queue).is_ok_and(|queue| queue < self.queues);
        if !self.holds(offset, len) || !part.iter().all(good) {
            return CtrlStatus::InvalidParameter;
        }
        let places = self.mapping.iter_mut().skip(offset as usize);
        places.zip(part).for_each(|(place, queue)| *place = *queue as usize);
        CtrlStatus::Success
    }
}
