//! Atomics, locks and queues of the protocols between threads: those of the standard library, and
//! loom's in a build with `--cfg loom`. Such a build explores every interleaving of the shipped
//! code and every value that the memory model allows a load to return (`cargo xtask test loom`).
//!
//! For the crates of pvio only.
#![forbid(unsafe_code)]

#[cfg(not(loom))]
pub use core::sync::atomic;
#[cfg(loom)]
pub use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(all(not(loom), feature = "std"))]
pub use std::sync::{Condvar, Mutex, MutexGuard};

#[cfg(loom)]
pub use model::{ArrayQueue, Signal};

/// Loom's atomics. Their stores are exchanges: loom does not order a store after another thread's
/// exchange that read an older value, so it would find executions that no memory model allows.
#[cfg(loom)]
pub mod atomic {
    use core::ops::Deref;
    use loom::sync::atomic;
    pub use loom::sync::atomic::{Ordering, fence};

    macro_rules! atomics {
        ($($name:ident $value:ty),*) => {$(
            #[derive(Debug, Default)]
            pub struct $name(atomic::$name);

            impl $name {
                pub fn new(value: $value) -> Self {
                    Self(atomic::$name::new(value))
                }

                pub fn store(&self, value: $value, order: Ordering) {
                    self.0.swap(value, order);
                }
            }

            impl Deref for $name {
                type Target = atomic::$name;

                fn deref(&self) -> &Self::Target {
                    &self.0
                }
            }
        )*};
    }

    atomics!(AtomicBool bool, AtomicU32 u32, AtomicU64 u64, AtomicUsize usize);
}

#[cfg(loom)]
mod model {
    use super::atomic::{AtomicUsize, Ordering};
    use super::{Condvar, Mutex};
    use std::collections::VecDeque;
    use std::fmt;

    /// The queue of crossbeam in a model. It assumes less than the real one provides: its indices
    /// are acquired and released, without a total order of all accesses, and loads of an index may
    /// return an old value.
    pub struct ArrayQueue<T> {
        head: AtomicUsize,
        tail: AtomicUsize,
        capacity: usize,
        /// Locked between two operations on loom's atomics, so never contended.
        items: std::sync::Mutex<VecDeque<T>>,
    }

    impl<T> ArrayQueue<T> {
        pub fn new(capacity: usize) -> Self {
            let (head, tail) = (AtomicUsize::new(0), AtomicUsize::new(0));
            Self { head, tail, capacity, items: std::sync::Mutex::default() }
        }

        pub fn push(&self, item: T) -> Result<(), T> {
            let mut tail = self.tail.load(Ordering::Relaxed);
            loop {
                // An old value of the tail can be before the head.
                let len = tail.wrapping_sub(self.head.load(Ordering::Acquire));
                if (self.capacity..=usize::MAX / 2).contains(&len) {
                    return Err(item);
                }
                let next = tail.wrapping_add(1);
                let order = (Ordering::AcqRel, Ordering::Relaxed);
                match self.tail.compare_exchange(tail, next, order.0, order.1) {
                    Ok(_) => break,
                    Err(now) => tail = now,
                }
            }
            self.items.lock().unwrap().push_back(item);
            Ok(())
        }

        pub fn force_push(&self, mut item: T) -> Option<T> {
            let mut oldest = None;
            while let Err(refused) = self.push(item) {
                item = refused;
                oldest = self.pop();
            }
            oldest
        }

        pub fn pop(&self) -> Option<T> {
            let mut head = self.head.load(Ordering::Relaxed);
            loop {
                let tail = self.tail.load(Ordering::Acquire);
                if tail.wrapping_sub(head).cast_signed() <= 0 {
                    return None;
                }
                let next = head.wrapping_add(1);
                let order = (Ordering::AcqRel, Ordering::Relaxed);
                match self.head.compare_exchange(head, next, order.0, order.1) {
                    Ok(_) => return self.items.lock().unwrap().pop_front(),
                    Err(now) => head = now,
                }
            }
        }

        pub fn len(&self) -> usize {
            let head = self.head.load(Ordering::Acquire);
            self.tail.load(Ordering::Acquire).wrapping_sub(head).min(self.capacity)
        }

        pub fn is_empty(&self) -> bool {
            let head = self.head.load(Ordering::Acquire);
            self.tail.load(Ordering::Acquire) == head
        }

        pub fn capacity(&self) -> usize {
            self.capacity
        }
    }

    impl<T> fmt::Debug for ArrayQueue<T> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.debug_struct("ArrayQueue").finish_non_exhaustive()
        }
    }

    /// An eventfd in a model: the kernel changes it under a lock.
    #[derive(Debug, Default)]
    pub struct Signal {
        set: Mutex<bool>,
        changed: Condvar,
    }

    impl Signal {
        pub fn notify(&self) {
            *self.set.lock().unwrap() = true;
            self.changed.notify_one();
        }

        /// Returns whether it was set.
        pub fn clear(&self) -> bool {
            std::mem::take(&mut *self.set.lock().unwrap())
        }

        /// Waits until it is set, as `poll` does.
        pub fn wait(&self) {
            let mut set = self.set.lock().unwrap();
            while !*set {
                set = self.changed.wait(set).unwrap();
            }
        }
    }
}
