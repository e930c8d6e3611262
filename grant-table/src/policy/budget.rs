use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering};

/// Maximum number of cached mappings, shared by several users. A budget can be a part of another
/// one: for example one per guest, within one for the process.
///
/// ```
/// use pvio_grant_table::policy::MappingBudget;
///
/// let process = MappingBudget::new(10);
/// let guest = process.part(6);
/// let taken: Vec<_> = std::iter::from_fn(|| guest.take()).collect();
/// assert_eq!((taken.len(), guest.used(), process.used()), (6, 6, 6));
/// let other = process.part(6);
/// assert_eq!(std::iter::from_fn(|| other.take()).map(std::mem::forget).count(), 4);
/// drop(taken);
/// assert_eq!((guest.used(), process.used()), (0, 4));
/// ```
pub struct MappingBudget {
    used: AtomicUsize,
    most: usize,
    within: Option<Arc<Self>>,
}

/// A permit for one cached mapping. Dropping it returns it to the budget.
#[derive(Debug)]
pub struct MappingPermit(Arc<MappingBudget>);

impl MappingBudget {
    /// Creates a budget of `most` pages.
    #[must_use]
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), most, within: None })
    }

    /// Creates a budget without a limit.
    #[must_use]
    pub fn unlimited() -> Arc<Self> {
        Self::new(usize::MAX)
    }

    /// Creates a budget of `most` pages that also count against this one.
    #[must_use]
    pub fn part(self: &Arc<Self>, most: usize) -> Arc<Self> {
        let within = Some(Arc::clone(self));
        Arc::new(Self { used: AtomicUsize::new(0), most, within })
    }

    /// Takes a permit for one page, if this budget and the one it is a part of have one left.
    #[must_use]
    pub fn take(self: &Arc<Self>) -> Option<MappingPermit> {
        self.count_one().then(|| MappingPermit(Arc::clone(self)))
    }

    /// Counts one page more, here and in the budget that this one is a part of, if both have one left.
    fn count_one(&self) -> bool {
        let more = |used: usize| used.checked_add(1).filter(|used| *used <= self.most);
        if self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_err() {
            return false;
        }
        let outer = self.within.as_ref().is_none_or(|outer| outer.count_one());
        if !outer {
            self.used.fetch_sub(1, Ordering::Relaxed);
        }
        outer
    }

    /// Returns the number of pages that are cached.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Returns the maximum number of pages.
    #[must_use]
    pub const fn most(&self) -> usize {
        self.most
    }

    /// Returns the budget that this one is a part of.
    #[must_use]
    pub fn within(&self) -> Option<&Arc<Self>> {
        self.within.as_ref()
    }
}

impl Drop for MappingPermit {
    fn drop(&mut self) {
        let mut budget = Some(&self.0);
        while let Some(this) = budget {
            this.used.fetch_sub(1, Ordering::Relaxed);
            budget = this.within.as_ref();
        }
    }
}

impl fmt::Debug for MappingBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MappingBudget")
            .field("used", &self.used())
            .field("most", &self.most)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn returned_permit_leaves_no_reference_to_outer_budget() {
        let process = MappingBudget::new(2);
        let guest = process.part(2);
        let device = guest.part(2);
        drop([device.take().unwrap(), device.take().unwrap()]);
        drop(device);
        assert_eq!((Arc::strong_count(&guest), Arc::strong_count(&process)), (1, 2));
        drop(guest);
        assert_eq!((Arc::strong_count(&process), process.used()), (1, 0));
    }

    #[test]
    fn permit_that_outer_budget_refuses_is_returned_to_inner_one() {
        let process = MappingBudget::new(1);
        let [one, other] = [process.part(1), process.part(1)];
        let permit = one.take().unwrap();
        assert!(other.take().is_none());
        assert_eq!((other.used(), process.used()), (0, 1));
        drop(permit);
        assert!(other.take().is_some());
    }
}
