//! The index pairs of a ring's two directions, in shared memory.

use crate::indices::IndexMemory;
use crate::shm::{IndexWord, RingMemory, SharedMemory};
use core::sync::atomic::Ordering;

/// The request direction of a ring in shared memory.
pub(crate) struct Requests<'a, M>(pub &'a RingMemory<M>);
/// The response direction of a ring in shared memory.
pub(crate) struct Responses<'a, M>(pub &'a RingMemory<M>);

macro_rules! direction {
    ($name:ident, $prod:ident, $event:ident) => {
        impl<M: SharedMemory> IndexMemory for $name<'_, M> {
            #[inline]
            fn load_prod(&self) -> u32 {
                self.0.load_index(IndexWord::$prod, Ordering::Acquire)
            }

            #[inline]
            fn store_prod(&self, value: u32) {
                self.0.store_index(IndexWord::$prod, value, Ordering::Release);
            }

            #[inline]
            fn load_event(&self) -> u32 {
                self.0.load_index(IndexWord::$event, Ordering::Relaxed)
            }

            #[inline]
            fn store_event(&self, value: u32) {
                self.0.store_index(IndexWord::$event, value, Ordering::Relaxed);
            }

            #[inline]
            fn fence(&self) {
                self.0.fence();
            }
        }
    };
}

direction!(Requests, ReqProd, ReqEvent);
direction!(Responses, RspProd, RspEvent);
