use super::{access, in_page, through};
use crate::{CopyOp, GrantCopier, GrantMapper, GrantRef, GrantStatus};

/// Maximum number of pages mapped together: limits the stack space.
const AT_ONCE: usize = 64;

/// Copies through temporary mappings: the pages of a batch are mapped, copied from or to, and
/// unmapped.
///
/// Consecutive copies of one domain in one direction are mapped together, up to 64 of them, with
/// one [`map_each`](GrantMapper::map_each).
#[derive(Clone, Copy, Debug)]
pub struct Mapped<P>(P);

impl<P: GrantMapper> Mapped<P> {
    /// Copies through mappings made by `mapper`.
    pub const fn new(mapper: P) -> Self {
        Self(mapper)
    }
}

impl<P: GrantMapper> GrantCopier for Mapped<P> {
    fn copy(&self, ops: &mut [CopyOp<'_>]) {
        let alike = |a: &CopyOp<'_>, b: &CopyOp<'_>| a.domain == b.domain && access(a) == access(b);
        for ops in ops.chunk_by_mut(alike).flat_map(|run| run.chunks_mut(AT_ONCE)) {
            let mut grefs = [GrantRef::default(); AT_ONCE];
            grefs.iter_mut().zip(&*ops).for_each(|(gref, op)| *gref = op.gref);
            let (Some(first), Some(grefs)) = (ops.first(), grefs.get(..ops.len())) else {
                continue;
            };
            let (domain, access) = (first.domain, access(first));
            self.0.map_each(domain, grefs, access, &mut |i, mapped| {
                let Some(op) = ops.get_mut(i) else { return };
                match mapped {
                    _ if !in_page(op) => op.status = GrantStatus::BadCopyArgument,
                    Ok(page) => through(&page, op),
                    Err(status) => op.status = status,
                }
            });
        }
    }
}
