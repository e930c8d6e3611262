//! Mapping and copying pages granted by other domains.

use crate::domain::XenDomain;
use crate::error::NotifyError;
use crate::events::Channel;
use crate::sys::gntdev::Grants;
use crate::sys::memory::Held;
use pvio_event_channel::EventChannel;
use pvio_grant_table::{
    Access, CopyBuf, CopyOp, DomId, GrantCopier, GrantMapper, GrantRef, GrantStatus,
};
use pvio_ring::shm::{PAGE_SIZE, SharedMemory};
use rustix::io::Errno;
use std::sync::Arc;

/// Pages of another domain, mapped until dropped. They stay readable even if that domain is
/// destroyed.
///
/// Pages that one [`map_each`](GrantMapper::map_each) mapped are unmapped together, when the last
/// of them is dropped: one mapping and one hypercall for all of them make a batch cheap. So map
/// pages together that are unmapped together, such as the pages of one request.
pub type Mapping = Held<Grants>;

/// Largest number of pages in one mapping.
const MOST_PAGES: usize = 1024;
/// Number of retries of a copy whose page is [not available yet](GrantStatus::Again).
const RETRIES: u32 = 3;

/// Actions when a mapping is removed, either by a drop or by the end of this process.
#[derive(Clone, Copy, Default, Debug)]
pub struct UnmapNotify<'a> {
    /// Sets this byte, counted from the start of the mapping, to zero.
    pub clear_byte: Option<usize>,
    /// Then sends an event through this channel. The kernel keeps the channel open for as long as
    /// it may be needed.
    pub send_event: Option<&'a Channel>,
}

impl Held<Grants> {
    /// Requests the kernel to notify the other domain when the pages are unmapped, so that it
    /// learns of a crash of this process without xenstore. A later call replaces an earlier one;
    /// empty actions cancel it.
    ///
    /// # Errors
    /// [`NotifyError`].
    pub fn notify_unmap(&self, what: UnmapNotify<'_>) -> Result<(), NotifyError> {
        if !self.is_whole() {
            return Err(NotifyError::Batch);
        }
        if what.clear_byte.is_some_and(|at| at >= self.len()) {
            return Err(NotifyError::OutOfRange);
        }
        if what.clear_byte.is_some() && !self.writable() {
            return Err(NotifyError::ReadOnly);
        }
        let port = what.send_event.map(|channel| channel.port().0);
        self.run().extra.notify(what.clear_byte, port).map_err(NotifyError::Refused)
    }
}

impl GrantMapper for XenDomain {
    type Mapping = Mapping;

    /// One `ioctl` and one `mmap` for up to 256 pages (or the module parameter `limit` of
    /// xen-gntdev, if that is less); at most 1024 pages, else [`GrantStatus::NoSpace`].
    ///
    /// The kernel does not report why a mapping failed. The reason is determined by copying a byte
    /// of each page; a page that can be read but not mapped for writing is
    /// [`GrantStatus::PermissionDenied`].
    ///
    /// A domain may grant pages to itself, but only a PV domain can map them; other domains get
    /// [`GrantStatus::BadDomain`]. In a PVH guest on Xen 4.17, such a page was observed to
    /// disappear from the kernel's own mapping (it read as all ones), and the guest hung soon
    /// after. Copying works in both.
    fn map(
        &self,
        domain: DomId,
        grefs: &[GrantRef],
        access: Access,
    ) -> Result<Mapping, GrantStatus> {
        if grefs.is_empty() || grefs.len() > MOST_PAGES {
            return Err(GrantStatus::NoSpace);
        }
        if !self.maps(domain) {
            return Err(GrantStatus::BadDomain);
        }
        match self.gntdev().map(domain, grefs, access == Access::ReadWrite) {
            Ok(run) => Ok(Held::whole(Arc::new(run))),
            Err(why) => Err(self.reason(why, domain, grefs, access)),
        }
    }

    /// One `ioctl` and one `mmap` for up to 256 pages, as [`map`](Self::map). If any page of a
    /// batch cannot be mapped, the pages are mapped one by one, so that an invalid reference fails
    /// only its own request.
    fn map_each(
        &self,
        domain: DomId,
        grefs: &[GrantRef],
        access: Access,
        each: &mut dyn FnMut(usize, Result<Mapping, GrantStatus>),
    ) {
        let gntdev = self.gntdev();
        let mut first = 0;
        for chunk in grefs.chunks(gntdev.at_once()) {
            let run = match chunk {
                // A single page gets its own status from `map`.
                [_] => None,
                _ if !self.maps(domain) => None,
                _ => gntdev.map(domain, chunk, access == Access::ReadWrite).ok().map(Arc::new),
            };
            for (i, gref) in chunk.iter().enumerate() {
                let mapped = match &run {
                    Some(run) => {
                        Held::part(run, i * PAGE_SIZE, PAGE_SIZE).ok_or(GrantStatus::GeneralError)
                    }
                    None => self.map(domain, core::slice::from_ref(gref), access),
                };
                each(first + i, mapped);
            }
            first += chunk.len();
        }
    }
}

impl XenDomain {
    /// Returns the reason why pages could not be mapped.
    #[cold]
    fn reason(&self, why: Errno, domain: DomId, grefs: &[GrantRef], access: Access) -> GrantStatus {
        match why {
            Errno::NOMEM | Errno::NOSPC => return GrantStatus::NoSpace,
            Errno::AGAIN => return GrantStatus::Again,
            _ => {}
        }
        let mut byte = [0];
        for gref in grefs {
            let with = CopyBuf::FromGrant(&mut byte);
            let status = GrantStatus::Okay;
            let mut probe = [CopyOp { domain, gref: *gref, offset: 0, with, status }];
            self.copy(&mut probe);
            let [CopyOp { status, .. }] = probe;
            if status != GrantStatus::Okay {
                return status;
            }
        }
        match access {
            Access::ReadWrite => GrantStatus::PermissionDenied,
            Access::ReadOnly => GrantStatus::GeneralError,
        }
    }
}

impl GrantCopier for XenDomain {
    /// One `ioctl` for up to 64 copies, of which the kernel makes one hypercall for every 16. A
    /// buffer that crosses a page counts as two, so frequently used buffers should be aligned.
    ///
    /// If a page is temporarily unavailable (paged out, or being shared), the kernel retries 255
    /// times with increasing pauses (33 s in total), and then returns [`GrantStatus::BadPage`].
    /// That can happen only with guests whose memory the toolstack pages or shares. If the kernel
    /// returns [`GrantStatus::Again`], the copy is retried three times without a pause.
    fn copy(&self, ops: &mut [CopyOp<'_>]) {
        let gntdev = self.gntdev();
        gntdev.copy(ops, |_| true);
        for _ in 0..RETRIES {
            if ops.iter().all(|op| op.status != GrantStatus::Again) {
                break;
            }
            gntdev.copy(ops, |status| status == GrantStatus::Again);
        }
    }
}
