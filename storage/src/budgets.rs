//! Budgets of cached mappings of guest pages in a process.

use alloc::collections::BTreeMap;
use alloc::sync::{Arc, Weak};
use pvio_grant_table::DomId;
use pvio_grant_table::policy::MappingBudget;
use std::sync::{LazyLock, Mutex, PoisonError};

/// Default of `vm.max_map_count`.
const USUAL_MAPS: usize = 65_530;

/// Budgets of cached mappings (persistent grants): one for the process and, within it, one for each
/// guest.
///
/// On Xen each such page is a memory mapping in the kernel, and a process may have
/// `vm.max_map_count` of these. The default is half of that for the process, which leaves the rest
/// to pages mapped for single requests, rings and threads, and half of that again for each guest.
#[derive(Clone, Debug)]
pub struct MappingBudgets {
    process: Arc<MappingBudget>,
    each: usize,
    guests: Arc<Mutex<BTreeMap<u16, Weak<MappingBudget>>>>,
}

impl MappingBudgets {
    /// Creates budgets of `process` pages for the process and, within these, `each` pages for each
    /// guest.
    #[must_use]
    pub fn new(process: usize, each: usize) -> Self {
        Self { process: MappingBudget::new(process), each, guests: Arc::default() }
    }

    /// Creates budgets with the default for each argument that is `None`.
    #[must_use]
    pub fn with(process: Option<usize>, each: Option<usize>) -> Self {
        let process = process.unwrap_or_else(|| most_maps() / 2);
        Self::new(process, each.unwrap_or(process / 2))
    }

    /// Returns the budget of the process.
    #[must_use]
    pub fn process(&self) -> &Arc<MappingBudget> {
        &self.process
    }

    /// Returns the budget of a guest in pages, for a process that serves it alone.
    #[must_use]
    pub const fn most_of_guest(&self) -> usize {
        self.each
    }

    /// Returns the budget of a guest, which all of its disks share.
    #[must_use]
    pub fn guest(&self, id: DomId) -> Arc<MappingBudget> {
        let mut guests = self.guests.lock().unwrap_or_else(PoisonError::into_inner);
        guests.retain(|_, guest| guest.strong_count() > 0);
        if let Some(guest) = guests.get(&id.0).and_then(Weak::upgrade) {
            return guest;
        }
        let guest = self.process.part(self.each);
        guests.insert(id.0, Arc::downgrade(&guest));
        guest
    }
}

impl Default for MappingBudgets {
    /// Returns the default budgets of this process, which are shared by all users of the default.
    fn default() -> Self {
        static USUAL: LazyLock<MappingBudgets> = LazyLock::new(|| MappingBudgets::with(None, None));
        USUAL.clone()
    }
}

/// Returns the maximum number of mappings of this process.
fn most_maps() -> usize {
    let found = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok();
    found.and_then(|text| text.trim().parse().ok()).unwrap_or(USUAL_MAPS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn disks_of_guest_share_one_budget_within_process_budget() {
        let budgets = MappingBudgets::new(10, 6);
        let [disk, another] = [(); 2].map(|()| budgets.guest(DomId(1)));
        let taken: Vec<_> =
            (0..3).flat_map(|_| [disk.take(), another.take()]).map(Option::unwrap).collect();
        assert!(disk.take().is_none() && another.take().is_none());
        let other = budgets.guest(DomId(2));
        let rest: Vec<_> = core::iter::from_fn(|| other.take()).collect();
        assert_eq!((taken.len(), rest.len(), budgets.process.used()), (6, 4, 10));
        drop((taken, rest, disk, another, other));
        // The budget of a guest without disks is removed.
        let _third = budgets.guest(DomId(3));
        assert_eq!((budgets.guests.lock().unwrap().len(), budgets.process.used()), (1, 0));
    }

    #[test]
    fn default_budget_is_half_of_kernel_map_limit_and_shared_by_process() {
        let usual = MappingBudgets::default();
        assert_eq!((usual.process.most(), usual.each), (most_maps() / 2, most_maps() / 4));
        assert!(Arc::ptr_eq(&usual.process, &MappingBudgets::default().process));
        let given = MappingBudgets::with(Some(100), None);
        assert_eq!((given.process.most(), given.each), (100, 50));
    }
}
