//! Shared memory for the model checker loom: the index words of a ring are loom's atomics, so that a
//! model runs the shipped [`FrontRing`](crate::FrontRing) and [`BackRing`](crate::BackRing) with
//! the orderings in their source. Only builds with `--cfg loom` contain it.

use super::{HeapMemory, IndexWord, NonNull, Ordering, SharedMemory};
use alloc::sync::Arc;
use loom::sync::atomic::{AtomicU32, AtomicU64, fence};

/// An ordering that the memory of one side ignores, to show that a model fails without it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Weakened {
    /// Nothing: the orderings of the source apply.
    Nothing,
    /// Stores of an index are relaxed.
    Stores,
    /// Loads of an index are relaxed.
    Loads,
    /// Fences have no effect.
    Fences,
}

/// Memory of a ring in a model. Its clones share it. Slots are ordinary memory, in which loom sees
/// no race: a model stores the contents of its items in atomics of its own.
#[derive(Clone, Debug)]
pub struct ModelMemory {
    slots: HeapMemory,
    words: Arc<[AtomicU32; 4]>,
    /// Words of the shared info page: pending and mask bits of the first ports.
    bits: Arc<[AtomicU64; 2]>,
    weakened: Weakened,
}

impl ModelMemory {
    /// Returns one page. To be called in a model only.
    #[must_use]
    pub fn page() -> Self {
        let words = Arc::new(core::array::from_fn(|_| AtomicU32::new(0)));
        let bits = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        Self { slots: HeapMemory::pages(1), words, bits, weakened: Weakened::Nothing }
    }

    /// Returns the same memory for one side, which ignores an ordering.
    #[must_use]
    pub fn weakened(&self, weakened: Weakened) -> Self {
        Self { weakened, ..self.clone() }
    }

    pub(super) fn load(&self, word: IndexWord, order: Ordering) -> u32 {
        let relaxed = self.weakened == Weakened::Loads;
        self.word(word).load(if relaxed { Ordering::Relaxed } else { order })
    }

    pub(super) fn store(&self, word: IndexWord, value: u32, order: Ordering) {
        let relaxed = self.weakened == Weakened::Stores;
        self.word(word).store(value, if relaxed { Ordering::Relaxed } else { order });
    }

    pub(super) fn fence(&self) {
        if self.weakened != Weakened::Fences {
            fence(Ordering::SeqCst);
        }
    }

    /// Returns the word of 64 bits at an offset: the first of the memory, or another one.
    pub(super) fn bits(&self, offset: usize) -> &AtomicU64 {
        let [first, other] = &*self.bits;
        if offset == 0 { first } else { other }
    }

    fn word(&self, word: IndexWord) -> &AtomicU32 {
        let [req_prod, req_event, rsp_prod, rsp_event] = &*self.words;
        match word {
            IndexWord::ReqProd => req_prod,
            IndexWord::ReqEvent => req_event,
            IndexWord::RspProd => rsp_prod,
            IndexWord::RspEvent => rsp_event,
        }
    }
}

// SAFETY: `slots` keeps the promise and lives as long as this value.
unsafe impl SharedMemory for ModelMemory {
    fn base(&self) -> NonNull<u8> {
        self.slots.base()
    }

    fn len(&self) -> usize {
        self.slots.len()
    }

    fn model(&self) -> Option<&Self> {
        Some(self)
    }
}
